"""The page about runs, from their folders alone. Imports neither torch nor Megatron."""
