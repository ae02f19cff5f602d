//! refcounts
