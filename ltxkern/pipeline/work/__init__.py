"""What a run has done, kept on disk as it goes, so that it can be continued with the same bits."""
