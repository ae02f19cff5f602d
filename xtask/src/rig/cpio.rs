//! Writes cpio archives in the "newc" format, as the kernel unpacks them into its initial root.
//!
//! Written by hand because an initial root needs device nodes, and making those in a directory for
//! `cpio` to read would need root.

const HEADER: &str = "070701";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction. Names have no leading slash; parents come before their children.
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    /// Adds a directory.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file with the permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, REGULAR | mode, (0, 0), content);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER | 0o600, (major, minor), &[]);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("an initial root's files are far below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        // inode, mode, uid, gid, links, time, size, device of the file, device it is, name size, checksum
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend_from_slice(HEADER.as_bytes());
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One entry as read back: name, mode, device number, content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let from = at + 6 + index * 8;
                u32::from_str_radix(std::str::from_utf8(&archive[from..from + 8]).unwrap(), 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((
                name,
                field(1),
                (field(9), field(10)),
                archive[data..data + size].to_vec(),
            ));
            at = (data + size).next_multiple_of(4);
        }
    }

    #[test]
    fn entries_come_back_whole_whatever_their_alignment() {
        let mut cpio = Cpio::default();
        cpio.directory("dev");
        cpio.character_device("dev/console", 5, 1);
        for length in 0..9_usize {
            cpio.file(&"n".repeat(length + 1), 0o755, &vec![7; length]);
        }
        let archive = cpio.finish();
        assert_eq!(archive.len() % 512, 0);
        let entries = read(&archive);
        assert_eq!(entries[0], ("dev".into(), 0o040_755, (0, 0), vec![]));
        assert_eq!(entries[1], ("dev/console".into(), 0o020_600, (5, 1), vec![]));
        for (length, entry) in entries[2..].iter().enumerate() {
            assert_eq!(
                *entry,
                ("n".repeat(length + 1), 0o100_755, (0, 0), vec![7; length])
            );
        }
        assert_eq!(entries.len(), 11);
    }
}
