from store_fixtures import bucket, proxy, served

__all__ = ["bucket", "proxy", "served"]
