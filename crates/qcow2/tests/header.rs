//! The header: what is read, refused, kept and written.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use zbdkit_qcow2::{Compression, Error, Extension, Header};
use zbdkit_spec::qcow2 as spec;
use zerocopy::{FromBytes, IntoBytes};

/// Where things lie in the sample.
const REFTABLE: u64 = 0x10000;
const L1: u64 = 0x30000;
const FILE_LEN: u64 = 0x40000;

/// A version-3 header of QEMU's shape: 64 KiB clusters, a device of 1 GiB.
fn sample() -> Header {
    let mut header = Header::new(16);
    header.size = 1 << 30;
    header.refcount_table_offset = REFTABLE;
    header.refcount_table_clusters = 1;
    header.l1_offset = L1;
    header.l1_size = 2;
    header
}

fn encoded(header: &Header) -> Vec<u8> {
    header.encode().expect("it encodes")
}

fn decode(bytes: &[u8]) -> Result<Header, Error> {
    Header::decode(bytes, FILE_LEN)
}

/// Decodes the sample after `change` was made to its raw header.
fn changed(change: impl FnOnce(&mut spec::Header)) -> Result<Header, Error> {
    let mut bytes = encoded(&sample());
    change(spec::Header::mut_from_prefix(&mut bytes).expect("a header").0);
    decode(&bytes)
}

fn message(result: Result<Header, Error>) -> String {
    result.expect_err("a header that is wrong").to_string()
}

/// A first cluster with the sample's header and these extensions, as they are.
fn with_extensions(extensions: &[(u32, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = encoded(&sample())[..112].to_vec();
    for (magic, len, data) in extensions {
        bytes.extend_from_slice(&magic.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

#[test]
fn what_is_encoded_is_read_back() {
    let mut header = sample();
    header.backing_file = Some("base.qcow2".into());
    header.set_extension(spec::EXT_BACKING_FORMAT, Some(b"qcow2".to_vec()));
    header.set_extension(0x1234_5678, Some(b"nobody knows".to_vec()));
    header.compression = Compression::Zstd;
    header.incompatible = spec::INCOMPAT_COMPRESSION | spec::INCOMPAT_EXTENDED_L2;
    header.l1_size = 4;
    let read = decode(&encoded(&header)).expect("it is right");
    assert_eq!(read, header);
    assert_eq!(read.backing_format(), Some("qcow2"));
    assert_eq!(read.l2_entries(), 4096);
    assert_eq!(read.subcluster_size(), 2048);
}

#[test]
fn version_2_is_written_as_version_2() {
    let mut header = sample();
    header.version = 2;
    header.backing_file = Some("base".into());
    let bytes = encoded(&header);
    assert_eq!(&bytes[72..80], &[0; 8], "the extensions end at once");
    assert_eq!(&bytes[80..84], b"base");
    assert_eq!(decode(&bytes).expect("it is right"), header);
}

#[test]
fn a_header_of_104_bytes_is_read() {
    let mut bytes = encoded(&sample());
    bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
    bytes.copy_within(112.., 104);
    let header = decode(&bytes).expect("the shortest header of version 3");
    assert_eq!(header, sample());
    assert_eq!(encoded(&header)[103], 112, "it is written with all fields");
}

#[test]
fn unknown_fields_extensions_and_names_are_kept() {
    let mut name = spec::FeatureName {
        kind: spec::FEATURE_COMPATIBLE,
        bit: 7,
        name: [0; 46],
    };
    name.name[..5].copy_from_slice(b"seven");
    let mut bytes = with_extensions(&[
        (0xaaaa, 3, b"one"),
        (spec::EXT_FEATURE_NAMES, 48, name.as_bytes()),
        (0xaaaa, 3, b"two"),
        (0, 0, b""),
    ]);
    bytes.splice(112..112, *b"new field:       ..12345"); // 24 bytes
    bytes[100..104].copy_from_slice(&136_u32.to_be_bytes());
    let header = decode(&bytes).expect("it is right");
    let extension = |data: &[u8]| Extension {
        magic: 0xaaaa,
        data: data.to_vec(),
    };
    assert_eq!(header.extensions, [extension(b"one"), extension(b"two")]);
    let again = encoded(&header);
    assert_eq!(&again[..136], &bytes[..136]);
    let contains = |what: &[u8]| again.windows(what.len()).any(|w| w == what);
    assert!(contains(name.as_bytes()), "the name of compatible bit 7");
    assert!(contains(b"dirty bit"), "names of ours");
    assert!(!contains(b"zoned format"), "an image without zones");
    assert_eq!(decode(&again).expect("it is right"), header);
}

#[test]
fn extensions_of_zones_lie_in_the_first_sector() {
    let mut header = Header::new(9);
    header.incompatible = spec::INCOMPAT_ZONED;
    header.set_extension(0x5555, Some(vec![1; 64]));
    header.set_extension(spec::EXT_ZBDKIT, Some(vec![2; 56]));
    header.set_extension(spec::EXT_ZONED, Some(vec![3; 44]));
    let bytes = encoded(&header);
    assert_eq!(&bytes[112..116], spec::EXT_ZONED.to_be_bytes());
    assert_eq!(&bytes[168..172], spec::EXT_ZBDKIT.to_be_bytes());
    assert_eq!(&bytes[232..236], 0x5555_u32.to_be_bytes());
    let name = b"zoned format";
    assert!(
        bytes.windows(name.len()).any(|w| w == name),
        "QEMU can say why it refuses"
    );

    let mut bytes = encoded(&sample());
    bytes.splice(112..112, [b'x'; 400]);
    bytes[100..104].copy_from_slice(&512_u32.to_be_bytes());
    let mut crowded = decode(&bytes).expect("it is right");
    crowded.set_extension(spec::EXT_ZONED, Some(vec![3; 44]));
    assert!(
        matches!(crowded.encode(), Err(Error::Unsupported(_))),
        "no room in the sector"
    );
}

#[test]
fn feature_names_give_way_to_what_is_needed() {
    let mut header = Header::new(12);
    header.backing_file = Some("b".repeat(1023));
    header.set_extension(0x77, Some(vec![1; 2900]));
    let bytes = encoded(&header);
    assert!(!bytes.windows(9).any(|w| w == b"dirty bit"));
    header.set_extension(0x77, Some(vec![1; 2960]));
    assert!(
        matches!(header.encode(), Err(Error::Refused(_))),
        "it fits nowhere"
    );
    header.set_extension(0x77, None);
    assert!(encoded(&header).windows(9).any(|w| w == b"dirty bit"));
}

#[test]
fn unknown_incompatible_features_are_named() {
    let mut header = sample();
    header.incompatible = 1 << 5 | 1 << 40 | spec::INCOMPAT_DIRTY;
    let refusal = |header: &Header, known| header.check_features(known).expect_err("unknown").to_string();
    assert_eq!(
        refusal(&header, 0),
        "Unsupported qcow2 feature(s): zoned format, zbdkit zone states"
    );
    assert_eq!(
        refusal(&header, 1 << 5),
        "Unsupported qcow2 feature(s): zbdkit zone states"
    );
    assert_eq!(header.check_features(1 << 5 | 1 << 40), Ok(()));

    let mut name = spec::FeatureName {
        kind: spec::FEATURE_INCOMPATIBLE,
        bit: 9,
        name: [0; 46],
    };
    name.name[..10].copy_from_slice(b"nine\x1b[31m!");
    let mut bytes = with_extensions(&[(spec::EXT_FEATURE_NAMES, 48, name.as_bytes()), (0, 0, b"")]);
    bytes[72..80].copy_from_slice(&(1_u64 << 9 | 1 << 10).to_be_bytes());
    let header = decode(&bytes).expect("features are not judged");
    assert_eq!(
        refusal(&header, 0),
        "Unsupported qcow2 feature(s): nine?[31m!, Unknown incompatible feature: 400"
    );
}

#[test]
fn encrypted_images_are_refused() {
    for method in [1, 2] {
        let header = changed(|raw| raw.crypt_method = method.into()).expect("it is read");
        assert_eq!(header.check_features(0), Err(Error::Encrypted));
    }
    let header = changed(|raw| raw.crypt_method = 3.into()).expect("it is read");
    assert!(matches!(header.check_features(0), Err(Error::Unsupported(_))));
}

#[test]
fn a_writer_clears_the_autoclear_features_that_it_does_not_know() {
    let mut header = sample();
    header.incompatible = spec::INCOMPAT_DATA_FILE;
    header.autoclear = spec::AUTOCLEAR_DATA_FILE_RAW | spec::AUTOCLEAR_BITMAPS | 1 << 2 | 1 << 40;
    assert!(header.clear_unknown_autoclear(spec::AUTOCLEAR_ZONE_TABLE));
    assert_eq!(header.autoclear, spec::AUTOCLEAR_DATA_FILE_RAW | 1 << 40);
    assert!(!header.clear_unknown_autoclear(spec::AUTOCLEAR_ZONE_TABLE));
    assert!(header.clear_unknown_autoclear(0));
}

#[test]
fn numbers_out_of_their_limits_are_refused() {
    type Change = fn(&mut spec::Header);
    let wrong: [(Change, &str); 29] = [
        (
            |raw| raw.magic = 0x5146_49fa.into(),
            "Image is not in qcow2 format",
        ),
        (|raw| raw.version = 4.into(), "Unsupported qcow2 version 4"),
        (|raw| raw.version = 1.into(), "Unsupported qcow2 version 1"),
        (|raw| raw.cluster_bits = 8.into(), "Unsupported cluster size: 2^8"),
        (
            |raw| raw.cluster_bits = 22.into(),
            "Unsupported cluster size: 2^22",
        ),
        (
            |raw| raw.cluster_bits = u32::MAX.into(),
            "Unsupported cluster size: 2^4294967295",
        ),
        (|raw| raw.header_length = 96.into(), "qcow2 header too short"),
        (
            |raw| raw.header_length = 65544.into(),
            "qcow2 header exceeds cluster size",
        ),
        (
            |raw| raw.header_length = 113.into(),
            "qcow2 header length 113 is not a multiple of 8",
        ),
        (
            |raw| raw.backing_file_offset = 65537.into(),
            "Invalid backing file offset",
        ),
        (
            |raw| raw.backing_file_offset = 8.into(),
            "Invalid backing file offset",
        ),
        (
            |raw| {
                raw.backing_file_offset = 1024.into();
                raw.backing_file_size = 1024.into();
            },
            "Backing file name too long",
        ),
        (
            |raw| {
                raw.backing_file_offset = 65530.into();
                raw.backing_file_size = 7.into();
            },
            "Backing file name too long",
        ),
        (
            |raw| raw.compression_type = 9,
            "qcow2: unknown compression type: 9",
        ),
        (
            |raw| raw.compression_type = 1,
            "qcow2: Compression type incompatible feature bit must be set",
        ),
        (
            |raw| raw.incompatible_features = 8.into(),
            "qcow2: Compression type incompatible feature bit must not be set",
        ),
        (
            |raw| {
                raw.cluster_bits = 13.into();
                raw.incompatible_features = 16.into();
            },
            "Unsupported subcluster size: 256",
        ),
        (
            |raw| raw.refcount_order = 7.into(),
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        (
            |raw| raw.refcount_table_clusters = 0.into(),
            "Image does not contain a reference count table",
        ),
        (
            |raw| raw.refcount_table_clusters = 129.into(),
            "Reference count table too large",
        ),
        (
            |raw| raw.refcount_table_offset = 512.into(),
            "Reference count table offset invalid",
        ),
        (
            |raw| raw.refcount_table_offset = (u64::MAX << 16).into(),
            "Reference count table offset invalid",
        ),
        (|raw| raw.nb_snapshots = 65537.into(), "Snapshot table too large"),
        (
            |raw| raw.snapshots_offset = 1.into(),
            "Snapshot table offset invalid",
        ),
        (
            |raw| raw.l1_size = (4 << 20 | 1).into(),
            "Active L1 table too large",
        ),
        (
            |raw| raw.l1_table_offset = 8.into(),
            "Active L1 table offset invalid",
        ),
        (|raw| raw.l1_size = 1.into(), "L1 table is too small"),
        (|raw| raw.size = (u64::MAX).into(), "Image is too big"),
        (
            |raw| raw.autoclear_features = 2.into(),
            "data-file-raw requires a data file",
        ),
    ];
    for (change, expected) in wrong {
        assert_eq!(message(changed(change)), expected);
    }
    assert_eq!(
        decode(b"QFI\xfb"),
        Err(Error::Unsupported("Unsupported qcow2 version 0".into()))
    );
    assert_eq!(decode(b""), Err(Error::NotQcow2));
}

#[test]
fn wrong_extensions_are_refused() {
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| spec::BitmapsExtension {
        nb_bitmaps: count.into(),
        reserved: reserved.into(),
        directory_size: size.into(),
        directory_offset: offset.into(),
    };
    let refusal = |extension: (u32, u32, &[u8]), autoclear: u64| {
        let mut bytes = with_extensions(&[extension, (0, 0, b"")]);
        bytes[88..96].copy_from_slice(&autoclear.to_be_bytes());
        message(decode(&bytes))
    };
    assert_eq!(
        refusal((9, 65536 - 112 - 7, b""), 0),
        "Header extension too large"
    );
    assert_eq!(refusal((9, u32::MAX, b""), 0), "Header extension too large");
    assert_eq!(
        refusal((spec::EXT_BACKING_FORMAT, 16, &[b'x'; 16]), 0),
        "ERROR: ext_backing_format: len=16 too large (>=16)"
    );
    assert_eq!(
        refusal((spec::EXT_CRYPTO, 16, &[0; 16]), 0),
        "CRYPTO header extension only expected with LUKS encryption method"
    );
    assert_eq!(
        refusal((spec::EXT_CRYPTO, 8, &[0; 8]), 0),
        "CRYPTO header extension size 8, but expected size 16"
    );
    assert_eq!(
        refusal((spec::EXT_DATA_FILE, 2, b"\xff\xfe"), 0),
        "the name of the data file is not UTF-8"
    );
    let mut twice = with_extensions(&[
        (spec::EXT_ZONED, 1, b"1"),
        (spec::EXT_ZONED, 1, b"2"),
        (0, 0, b""),
    ]);
    assert_eq!(
        message(decode(&twice)),
        "header extension 0x007a6264 is there twice"
    );
    twice[112..116].fill(1);
    assert!(decode(&twice).is_ok());

    for (wrong, expected) in [
        (bitmaps(0, 0, 24, 0), "found bitmaps extension with zero bitmaps"),
        (bitmaps(1, 1, 24, 0), "bitmaps_ext: Reserved field is not zero"),
        (
            bitmaps(1, 0, 24, 8),
            "bitmaps_ext: invalid bitmap directory offset",
        ),
        (
            bitmaps(65536, 0, 24, 0),
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
        (
            bitmaps(1, 0, 1 << 40, 0),
            "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
        ),
    ] {
        assert_eq!(refusal((spec::EXT_BITMAPS, 24, wrong.as_bytes()), 1), expected);
        let ignored = with_extensions(&[(spec::EXT_BITMAPS, 24, wrong.as_bytes()), (0, 0, b"")]);
        assert!(
            decode(&ignored).is_ok(),
            "what is out of date anyway is nobody's business"
        );
    }
    assert_eq!(
        refusal((spec::EXT_BITMAPS, 8, &[0; 8]), 1),
        "bitmaps_ext: Invalid extension length"
    );
}

#[test]
fn tables_past_the_end_of_the_file_are_told() {
    let bytes = encoded(&sample());
    assert!(
        Header::decode(&bytes, L1 + 16).is_ok(),
        "the rest of a cluster may be missing"
    );
    assert!(Header::decode(&bytes, u64::MAX).is_ok());
    let what = "active L1 table";
    let (offset, len) = (L1, L1);
    assert_eq!(
        Header::decode(&bytes, L1),
        Err(Error::Truncated { what, offset, len })
    );
    let (what, offset, len) = ("refcount table", REFTABLE, 100);
    let mut only_reftable = sample();
    (only_reftable.size, only_reftable.l1_size) = (0, 0);
    assert_eq!(
        Header::decode(&encoded(&only_reftable), len),
        Err(Error::Truncated { what, offset, len })
    );
}

/// Valid headers with all that a header can have.
fn any_header() -> impl Strategy<Value = Vec<u8>> {
    let extension = (
        prop_oneof![
            Just(spec::EXT_BACKING_FORMAT),
            Just(spec::EXT_FEATURE_NAMES),
            Just(spec::EXT_BITMAPS),
            Just(spec::EXT_DATA_FILE),
            Just(spec::EXT_ZONED),
            Just(spec::EXT_ZBDKIT),
            any::<u32>()
        ],
        prop::collection::vec(prop_oneof![Just(0), Just(b'a'), any::<u8>()], 0..120),
    );
    let fields = (
        9_u32..=21,
        0_u32..=6,
        2_u32..=3,
        0_u64..1 << 40,
        any::<u64>(),
        any::<[u64; 2]>(),
    );
    let rest = (
        prop::collection::vec(extension, 0..6),
        prop::collection::vec(any::<u8>(), 0..64),
        prop::option::of("[a-z]{0,40}"),
    );
    (fields, rest).prop_map(|(fields, (extensions, unknown, backing))| {
        let (cluster_bits, refcount_order, version, size, incompatible, [compatible, autoclear]) = fields;
        let mut header = Header::new(cluster_bits);
        (header.version, header.size, header.refcount_order) = (version, size, refcount_order);
        header.incompatible = incompatible & !spec::INCOMPAT_COMPRESSION;
        (header.compatible, header.autoclear) = (compatible, autoclear);
        header.l1_size = header.l1_entries_for(size).min(4 << 20) as u32;
        header.refcount_table_clusters = 1;
        header.backing_file = backing;
        let mut bytes = header.encode().expect("it fits");
        // The end mark and a backing file's name that `encode` put there may be overwritten: so much the better.
        let mut tail = Vec::new();
        for (magic, data) in extensions {
            tail.extend_from_slice(&magic.to_be_bytes());
            tail.extend_from_slice(&(data.len() as u32).to_be_bytes());
            tail.extend_from_slice(&data);
            tail.resize(tail.len().next_multiple_of(8), 0);
        }
        let unknown = &unknown[..unknown.len() / 8 * 8];
        let start = if version == 2 { 72 } else { 112 + unknown.len() };
        if version == 3 {
            bytes[100..104].copy_from_slice(&(start as u32).to_be_bytes());
            let room = (bytes.len() - 112).min(unknown.len());
            bytes[112..112 + room].copy_from_slice(&unknown[..room]);
        }
        let room = bytes.len().saturating_sub(start).min(tail.len());
        bytes[start..start + room].copy_from_slice(&tail[..room]);
        bytes
    })
}

/// What a header says, but for the names of features: they give way where there is no room for them.
fn said(header: &Header) -> impl PartialEq + std::fmt::Debug {
    let mut extensions = header.extensions.clone();
    extensions.sort_by_key(|extension| extension.magic);
    let h = header.clone();
    (
        (
            h.version,
            h.size,
            h.cluster_bits,
            h.refcount_order,
            h.crypt_method,
        ),
        (
            h.l1_size,
            h.l1_offset,
            h.refcount_table_offset,
            h.refcount_table_clusters,
        ),
        (h.nb_snapshots, h.snapshots_offset),
        (h.incompatible, h.compatible, h.autoclear, h.compression),
        (h.backing_file, extensions),
    )
}

/// Whatever can be read can be written so that it is read back the same, unless it does not fit any more.
fn check_stable(bytes: &[u8], len: u64) -> Result<bool, TestCaseError> {
    let Ok(header) = Header::decode(bytes, len) else {
        return Ok(false);
    };
    let _ = header.check_features(0);
    let first = match header.encode() {
        Ok(first) => first,
        Err(Error::Refused(_) | Error::Unsupported(_)) => return Ok(true),
        Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
    };
    prop_assert_eq!(first.len() as u64, header.cluster_size());
    let again = Header::decode(&first, len).expect("what was written is right");
    prop_assert_eq!(&again.encode().expect("it fitted"), &first);
    prop_assert_eq!(said(&again), said(&header));
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..600), len: u64) {
        check_stable(&bytes, len)?;
        let magic = spec::MAGIC.to_be_bytes();
        let front = [&magic[..], &3_u32.to_be_bytes()].concat();
        let n = front.len().min(bytes.len());
        bytes[..n].copy_from_slice(&front[..n]);
        check_stable(&bytes, len)?;
    }

    #[test]
    fn what_is_read_is_written_the_same(
        mut bytes in any_header(),
        changes in prop::collection::vec((0_usize..400, any::<u8>()), 0..4),
    ) {
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        check_stable(&bytes, u64::MAX >> 1)?;
    }
}

#[test]
fn most_of_the_headers_made_up_above_are_right() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let right = (0..500)
        .filter(|_| {
            let tree = any_header().new_tree(&mut runner).expect("a header");
            check_stable(&tree.current(), u64::MAX >> 1).expect("stable")
        })
        .count();
    assert!(
        right > 100,
        "only {right} of 500 were read: the property above says little"
    );
}
