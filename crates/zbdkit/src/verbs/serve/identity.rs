//! What hosts know a controller and its namespaces by: the same at each start.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use uuid::Uuid;
use zbdkit_nvme::uuid_of_name;

/// What an image says about itself, and what the user says about it.
pub(super) struct Image<'a> {
    /// Its own UUID; plain images have none.
    pub(super) own: Option<Uuid>,
    /// As the user wants it shown.
    pub(super) given: Option<Uuid>,
    /// As the user names it.
    pub(super) name: &'a str,
    /// The file at the bottom.
    pub(super) file: Option<&'a Path>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) subsystem: Uuid,
    /// In the order of the images.
    pub(super) namespaces: Vec<Uuid>,
}

impl Identity {
    /// Of a controller over these images.
    pub(super) fn of(images: &[Image<'_>]) -> Identity {
        let mut seen = BTreeMap::new();
        let mut namespaces = Vec::new();
        for image in images {
            let uuid = image.given.or(image.own).unwrap_or_else(|| {
                let place = image.place();
                let times = seen.entry(place.clone()).or_insert(0u32);
                *times += 1;
                named(place, *times)
            });
            namespaces.push(uuid);
        }
        let lasting = images.iter().find_map(|image| image.own.or(image.given));
        let first = namespaces.first().copied();
        Identity {
            subsystem: lasting.or(first).unwrap_or_else(Uuid::new_v4),
            namespaces,
        }
    }
}

impl Image<'_> {
    /// Where the image is; nowhere if in memory. A graph counts as a whole, as it may be a part of its file.
    fn place(&self) -> Option<Vec<u8>> {
        let file = self.file?;
        let found = file
            .canonicalize()
            .unwrap_or_else(|_| crate::image::absolute(file));
        let mut place = found.as_os_str().as_bytes().to_vec();
        if file.to_string_lossy() != self.name {
            place.push(0);
            place.extend_from_slice(self.name.as_bytes());
        }
        Some(place)
    }
}

/// The UUID of a place. The same image may be there several times, if nobody writes to it.
fn named(place: Option<Vec<u8>>, times: u32) -> Uuid {
    // What is in memory is new at each start.
    place.map_or_else(Uuid::new_v4, |place| {
        uuid_of_name(place.into_iter().chain(times.to_le_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(name: &str) -> Image<'_> {
        Image {
            own: None,
            given: None,
            name,
            file: Some(Path::new(name)),
        }
    }

    fn part<'a>(name: &'a str, file: &'a str) -> Image<'a> {
        Image {
            file: Some(Path::new(file)),
            ..plain(name)
        }
    }

    #[test]
    fn plain_images_are_known_by_where_they_are() {
        let both = Identity::of(&[plain("/no/a"), plain("/no/b")]);
        assert_eq!(both, Identity::of(&[plain("/no/a"), plain("/no/b")]));
        assert_eq!(both.subsystem, both.namespaces[0]);
        let turned = Identity::of(&[plain("/no/b"), plain("/no/a")]);
        assert_eq!(turned.namespaces, [both.namespaces[1], both.namespaces[0]]);
        let twice = Identity::of(&[plain("/no/a"), plain("/no/a")]);
        assert_eq!(twice.namespaces[0], both.namespaces[0]);
        assert_ne!(twice.namespaces[0], twice.namespaces[1]);
        let parts = Identity::of(&[part("offset=0", "/no/a"), part("offset=1M", "/no/a")]);
        assert_ne!(parts.namespaces[0], parts.namespaces[1]);
    }

    #[test]
    fn a_path_is_the_same_by_any_name() {
        let here = std::env::current_dir().unwrap();
        let whole = here.join("Cargo.toml");
        let whole = plain(whole.to_str().unwrap());
        assert_eq!(Identity::of(&[plain("Cargo.toml")]), Identity::of(&[whole]));
    }

    #[test]
    fn the_first_uuid_that_lasts_is_the_subsystems() {
        let (own, given) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let zoned = Image {
            own: Some(own),
            given: Some(given),
            ..plain("/no/z")
        };
        let identity = Identity::of(&[plain("/no/a"), zoned]);
        assert_eq!((identity.subsystem, identity.namespaces[1]), (own, given));
        let memory = || Image {
            file: None,
            ..plain("driver=memory,size=1M")
        };
        let identity = Identity::of(&[memory(), memory()]);
        assert_ne!(identity.namespaces[0], identity.namespaces[1]);
        assert_ne!(identity, Identity::of(&[memory(), memory()]));
    }
}
