"""How decoded pictures are displayed: orientation, pixel aspect, colours, transparency and HDR."""
