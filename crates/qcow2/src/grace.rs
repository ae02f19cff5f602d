//! grace
