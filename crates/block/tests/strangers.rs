//! Images that others made, and images beside others.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::{
    CreateOptions, Device, Error, Graph, Host, OpenError, OpenOptions, OsHost, RunStateMode, ZoneOp, create,
    default_sidecar,
};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_spec::sidecar::{BLOCK, Header, OPEN};
use zbdkit_zone::{Filter, Model, ZoneError};
use zerocopy::{FromBytes, IntoBytes};

const ZONE: u64 = 1 << 20;

fn host() -> Arc<dyn Host> {
    Arc::new(OsHost)
}

fn runtime() -> Runtime {
    Runtime::new(RuntimeOptions::default()).unwrap()
}

fn make(runtime: &Runtime, path: &Path, model: Model) {
    let mut options = CreateOptions::new(path, 8 * ZONE);
    options.model = model;
    options.zone_size = Some(ZONE);
    options.conventional_zones = 1;
    runtime.block_on(create(&host(), &options)).unwrap();
}

fn open(runtime: &Runtime, path: &Path, options: OpenOptions) -> Result<Device, OpenError> {
    let options = OpenOptions {
        lock_wait: Duration::ZERO,
        ..options
    };
    runtime.block_on(Graph::from_path(path).open(&host(), &options))
}

/// Changes both copies of the header, with checksums that are right.
fn forge(image: &Path, change: impl Fn(&mut Header)) {
    let path = default_sidecar(image);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    for copy in 0..2 {
        let mut bytes = [0; BLOCK];
        file.read_exact_at(&mut bytes, copy * BLOCK as u64).unwrap();
        let mut header = Header::read_from_bytes(&bytes).unwrap();
        change(&mut header);
        header.crc = 0.into();
        header.crc = crc32c::crc32c(header.as_bytes()).into();
        file.write_all_at(header.as_bytes(), copy * BLOCK as u64).unwrap();
    }
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    let runtime = runtime();
    let changes: [fn(&mut Header); 6] = [
        |header| header.nr_zones = 1.into(),
        |header| header.nr_zones = u32::MAX.into(),
        |header| header.zone_size = 0.into(),
        |header| header.zone_size = (ZONE / 2).into(),
        |header| header.generation = u64::MAX.into(),
        |header| header.epoch = u64::MAX.into(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        make(&runtime, &path, Model::HostManaged);
        forge(&path, change);
        let error = open(&runtime, &path, OpenOptions::default()).err().unwrap();
        assert!(error.to_string().contains("contradict"), "{number}: {error}");
        forge(&path, |header| {
            header.nr_zones = 8.into();
            header.zone_size = ZONE.into();
            header.generation = 2.into();
            header.epoch = 0.into();
        });
        open(&runtime, &path, OpenOptions::default()).unwrap();
    }
}

#[test]
fn a_header_cannot_have_just_any_file_opened_or_removed() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    make(&runtime, &path, Model::HostManaged);
    let (pipe, precious) = (dir.path().join("pipe"), dir.path().join("precious"));
    let status = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(status.unwrap().success());
    fs::write(&precious, "data").unwrap();
    for named in [&pipe, &precious] {
        forge(&path, |header| {
            header.open = OPEN;
            header.epoch = 1.into();
            let bytes = named.as_os_str().as_bytes();
            header.place[..bytes.len()].copy_from_slice(bytes);
            header.place_len = (bytes.len() as u16).into();
        });
        let device = open(&runtime, &path, OpenOptions::default()).unwrap();
        assert!(device.notices()[0].contains("cannot be used"));
        runtime.block_on(device.close()).unwrap();
        assert!(named.exists());
    }
    assert_eq!(fs::read(&precious).unwrap(), b"data");
}

#[test]
fn images_of_one_name_keep_their_run_states_in_one_directory() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let paths: [PathBuf; 2] = ["a", "b"].map(|name| {
        fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name).join("disk.raw")
    });
    let options = OpenOptions {
        run_state: RunStateMode::In(dir.path().into()),
        ..OpenOptions::default()
    };
    let [first, second] = paths.clone().map(|path| {
        make(&runtime, &path, Model::HostManaged);
        open(&runtime, &path, options.clone()).unwrap()
    });
    for device in [&first, &second] {
        let buf = IoBuf::alloc(4096);
        runtime
            .block_on(device.write(&device.lane(1), buf, ZONE))
            .unwrap();
    }
    // The second is as if killed, after the first one was closed.
    runtime.block_on(first.close()).unwrap();
    drop(second);
    let again = open(&runtime, &paths[1], options).unwrap();
    assert!(again.notices().is_empty(), "{:?}", again.notices());
    let zone = runtime.block_on(again.report(ZONE, Filter::All, 1)).unwrap()[0];
    assert_eq!(zone.wp, ZONE + 4096);
    runtime.block_on(again.close()).unwrap();
}

#[test]
fn nobody_writes_without_locks() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    make(&runtime, &path, Model::HostManaged);
    let shared = OpenOptions {
        force_share: true,
        ..OpenOptions::default()
    };
    let error = open(&runtime, &path, shared.clone()).err().unwrap();
    assert!(error.to_string().contains("read-only"), "{error}");
    let read_only = true;
    open(&runtime, &path, OpenOptions { read_only, ..shared }).unwrap();
}

#[test]
fn a_creation_that_fails_removes_only_what_it_made() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    for (link, other) in [("disk.raw", "disk.raw.zones"), ("disk.raw.zones", "disk.raw")] {
        // It leads nowhere, so it does not count as a file that exists.
        std::os::unix::fs::symlink("/nowhere/at/all", dir.path().join(link)).unwrap();
        let options = CreateOptions::new(dir.path().join("disk.raw"), 8 << 30);
        runtime.block_on(create(&host(), &options)).unwrap_err();
        assert!(dir.path().join(link).is_symlink());
        assert!(!dir.path().join(other).exists());
        fs::remove_file(dir.path().join(link)).unwrap();
    }
}

#[test]
fn a_discard_spares_zones_that_the_operator_closed() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    make(&runtime, &path, Model::HostAware);
    let device = open(&runtime, &path, OpenOptions::default()).unwrap();
    let lane = device.lane(1);
    runtime.block_on(async {
        device
            .write(&lane, IoBuf::from_vec(vec![7; 4096]), 0)
            .await
            .unwrap();
        device.zone_op(&lane, ZoneOp::SetReadOnly, 0).await.unwrap();
        let error = device.discard(&lane, 0, 4096).await.unwrap_err();
        assert!(
            matches!(error, Error::Zone(ZoneError::ReadOnly { .. })),
            "{error}"
        );
        device.zone_op(&lane, ZoneOp::SetNormal, 0).await.unwrap();
        device.discard(&lane, 0, 4096).await.unwrap();
    });
}

#[test]
fn every_lane_can_write_however_many_and_deep_they_are() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    make(&runtime, &path, Model::HostManaged);
    let device = open(&runtime, &path, OpenOptions::default()).unwrap();
    let lanes: Vec<_> = (0..256).map(|_| device.lane(32768)).collect();
    runtime.block_on(async {
        for lane in &lanes {
            device.append(lane, IoBuf::alloc(4096), ZONE).await.unwrap();
            if device.report(ZONE, Filter::All, 1).await.unwrap()[0].wp == 2 * ZONE {
                device.zone_op(lane, ZoneOp::Reset, ZONE).await.unwrap();
            }
        }
    });
}

#[test]
fn nothing_is_acknowledged_after_the_close() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    make(&runtime, &path, Model::HostManaged);
    let device = open(&runtime, &path, OpenOptions::default()).unwrap();
    let (late, lane) = (device.clone(), device.lane(1));
    runtime.block_on(device.close()).unwrap();
    runtime.block_on(async {
        late.write(&lane, IoBuf::alloc(4096), ZONE).await.unwrap_err();
        late.flush(&lane).await.unwrap_err();
    });
}
