//! Wire and on-disk types.
