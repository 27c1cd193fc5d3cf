"""Object stores: names, objects and local copies of s3://, gs:// and msc:// through NVIDIA's multi-storage-client."""
