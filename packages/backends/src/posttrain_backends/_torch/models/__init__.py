"""Models written in torch, and the shape they share."""
