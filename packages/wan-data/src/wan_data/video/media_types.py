"""Kinds of videos and images: file name suffixes, and the content that is read."""

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
    *(".flv", ".wmv", ".ogv", ".gif"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# FFmpeg's names of the containers of these suffixes. Its other demuxers read lists of files, playlists, session
# descriptions and patterns of names, which is how a file would bring in the content of others.
DEMUXERS = ("mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "flv", "asf", "ogg", "gif")
# Pillow's names.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

# First bytes of texts that name other files.
_LISTS = {
    b"ffconcat": "a list of files (ffconcat)",
    b"#EXTM3U": "a playlist (M3U)",
    b"[playlist]": "a playlist (PLS)",
    b"[Reference]": "a playlist (ASF)",
    b"v=0": "a session description (SDP)",
    b"<?xml": "an XML text",
    b"<MPD": "a manifest (DASH)",
    b"<ASX": "a playlist (ASX)",
}


def list_of_files(start: bytes) -> str | None:
    """What a text is that names other files, by its first bytes; None for anything else."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for prefix, kind in _LISTS.items() if text[: len(prefix)].lower() == prefix.lower()), None)
