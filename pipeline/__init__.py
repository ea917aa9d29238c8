"""label-bucket: label every image of a bucket with DeiT on Ray Data. Start reading at `pipeline.run`."""
