"""Data sets as tables with the images in them: parquet, and arrow files of `datasets`."""
