//! Compressed clusters.
