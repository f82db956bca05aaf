"""One run: settings, its folder and files, training, and the job that joins them."""
