"""One optimizer step after another: runs what a schedule plans on whatever layout the processes form."""
