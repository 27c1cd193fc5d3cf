"""What this package replaces in Megatron-Bridge and Megatron-Core, and reads from them, in every supported version.

All that depends on their version is in this folder and asks what is there, not for the version:

| module | content |
|---|---|
| ``replace`` | replacing a function, and verifying that who calls it calls the replacement |
| ``loop`` | the names of the training loop that other modules import |
| ``configuration`` | the sections of the configuration, and the keys that have moved or are new |
| ``checkpoints`` | where the hooks of saves and loads are placed |
| ``patches`` | functions that do nothing here, or not without CUDA or Transformer Engine |

No other module of wan-train imports ``megatron.bridge``.
"""
