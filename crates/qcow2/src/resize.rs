//! Changing the size of an image.
