"""The torch side of the backends. Imported on load only: nothing outside this package imports torch."""
