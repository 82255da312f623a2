"""What imports transformers and no framework: tokenizers. Imported on load only."""
