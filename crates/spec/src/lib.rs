//! Wire and on-disk types, and nothing else: no I/O, no policy, no unsafe code. Names and sections are the
//! specifications' own.

#![no_std]
#![forbid(unsafe_code)]

/// A number of the other side's choosing with names for the values that a specification gives: unknown ones survive.
macro_rules! open_enum {
    ($(#[$outer:meta])* pub struct $name:ident($int:ty) {
        $($(#[$inner:meta])* $value:ident = $number:expr,)+
    }) => {
        $(#[$outer])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable,
            zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $name(pub $int);

        #[allow(missing_docs, reason = "names of the specification; what they do not say has words")]
        impl $name {
            $($(#[$inner])* pub const $value: Self = Self($number);)+

            /// The specification's name of the value, where it has one.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some(stringify!($value)),)+
                    _ => None,
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{}({:#x})", stringify!($name), self.0),
                }
            }
        }
    };
}

pub mod blkzoned;
pub mod nvme;
pub mod qcow2;
pub mod scsi;
pub mod sidecar;
pub mod vfio_user;
pub mod virtio_blk;
