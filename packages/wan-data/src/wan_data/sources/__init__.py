"""Videos and images to prepare: found in a folder or a listing, with their captions, and compared with a dataset."""
