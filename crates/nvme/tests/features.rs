//! Get Features and Set Features.

mod host;

use host::{Host, PLAIN_NSID, entry, get_feature, identify, rw, set_feature};
use zbdkit_nvme::{ControllerOptions, NamespaceOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::nvm::Opcode;

const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT;

#[test]
fn features_have_values_defaults_and_capabilities() {
    let host = Host::new();
    let get = |fid: FeatureId, select, value| host.tell(get_feature(fid.0, select, value), &[]);
    let set = |fid: FeatureId, value| host.tell(set_feature(fid.0, value), &[]).0;
    let cases = [
        (FeatureId::ARBITRATION, 0x7, 0x0101_0103),
        (FeatureId::POWER_MANAGEMENT, 0, 0x20),
        (FeatureId::VOLATILE_WRITE_CACHE, 1, 0),
        (FeatureId::INTERRUPT_COALESCING, 0, 0x0a05),
        (FeatureId::WRITE_ATOMICITY_NORMAL, 0, 1),
        (FeatureId::ASYNC_EVENT_CONFIGURATION, 0, 0x0800_0100),
        (FeatureId::TEMPERATURE_THRESHOLD, 343, 400),
    ];
    for (fid, default, other) in cases {
        assert_eq!(get(fid, 0, 0), (Status::SUCCESS, default), "{fid:?}");
        assert_eq!(
            get(fid, 3, 0),
            (Status::SUCCESS, 0b100),
            "{fid:?}: can be changed"
        );
        assert_eq!(set(fid, other), Status::SUCCESS, "{fid:?}");
        assert_eq!(get(fid, 0, 0), (Status::SUCCESS, other.into()), "{fid:?}");
        assert_eq!(get(fid, 1, 0), (Status::SUCCESS, default), "{fid:?}: the default");
        assert_eq!(
            get(fid, 2, 0),
            (Status::SUCCESS, default),
            "{fid:?}: nothing is saved"
        );
    }
    assert_eq!(get(FeatureId::ARBITRATION, 4, 0).0, Status::INVALID_FIELD);
    let mut save = set_feature(FeatureId::ARBITRATION.0, 0);
    save.cdw10 = (1 << 31 | 1).into();
    assert_eq!(host.tell(save, &[]).0, Status::FEATURE_IDENTIFIER_NOT_SAVEABLE);
    let mut named = set_feature(FeatureId::ARBITRATION.0, 0);
    named.nsid = 1.into();
    assert_eq!(host.tell(named, &[]).0, Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
    for fid in [0, 0x03, 0x0c, 0x0d, 0x10, 0x17, 0x78, 0x80, 0x82, 0xff] {
        assert_eq!(
            host.tell(set_feature(fid, 0), &[]).0,
            Status::INVALID_FIELD,
            "{fid:#x}"
        );
        assert_eq!(
            host.tell(get_feature(fid, 0, 0), &[]).0,
            Status::INVALID_FIELD,
            "{fid:#x}"
        );
    }
    // Another power state, another sensor, another combination.
    assert_eq!(set(FeatureId::POWER_MANAGEMENT, 1), Status::INVALID_FIELD);
    assert_eq!(
        set(FeatureId::TEMPERATURE_THRESHOLD, 1 << 16),
        Status::INVALID_FIELD
    );
    assert_eq!(
        set(FeatureId::COMMAND_SET_PROFILE, 1),
        Status::COMMAND_SET_COMBINATION_REJECTED
    );
    assert_eq!(set(FeatureId::COMMAND_SET_PROFILE, 0), Status::SUCCESS);
    assert_eq!(
        get(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 0, 5),
        (Status::SUCCESS, 5)
    );
    assert_eq!(
        set(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 1 << 16 | 5),
        Status::SUCCESS
    );
    assert_eq!(
        get(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 0, 5),
        (Status::SUCCESS, 1 << 16 | 5)
    );
    assert_eq!(
        set(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 99),
        Status::INVALID_FIELD
    );
    host.controller.reset();
    assert_eq!(
        get(FeatureId::ARBITRATION, 0, 0).1,
        0x7,
        "a reset brings the defaults back"
    );
    host.must_work();
}

#[test]
fn error_recovery_is_each_namespaces_own() {
    let host = Host::new();
    let set = |nsid: u32, value| {
        let mut command = set_feature(FeatureId::ERROR_RECOVERY.0, value);
        command.nsid = nsid.into();
        host.tell(command, &[]).0
    };
    let get = |nsid: u32| {
        let mut command = get_feature(FeatureId::ERROR_RECOVERY.0, 0, 0);
        command.nsid = nsid.into();
        host.tell(command, &[])
    };
    assert_eq!(set(1, 7), Status::SUCCESS);
    assert_eq!((get(1).1, get(2).1), (7, 0));
    assert_eq!(set(NSID_ALL, 9), Status::SUCCESS);
    assert_eq!((get(1).1, get(2).1), (9, 9));
    assert_eq!(set(0, 9), INVALID_NAMESPACE);
    assert_eq!(get(NSID_ALL).0, INVALID_NAMESPACE);
    assert_eq!(
        set(1, 1 << 16),
        Status::INVALID_FIELD,
        "errors for deallocated blocks"
    );
    host.must_work();
}

#[test]
fn features_with_data_keep_it() {
    let host = Host::new();
    let get = |fid: FeatureId, value| host.ask(get_feature(fid.0, 0, value));
    let set = |fid: FeatureId, value, data: &[u8]| host.tell(set_feature(fid.0, value), data).0;
    let day = 86_400_000_u64;
    assert_eq!(
        set(FeatureId::TIMESTAMP, 0, &(day | 0xff << 56).to_le_bytes()),
        Status::SUCCESS
    );
    let now = get(FeatureId::TIMESTAMP, 0);
    assert_eq!((now.len(), now[6] >> 1 & 7), (8, 1), "set by the host");
    let mut milliseconds = [0; 8];
    milliseconds[..6].copy_from_slice(&now[..6]);
    assert!((day..2 * day).contains(&u64::from_le_bytes(milliseconds)));
    let id: Vec<u8> = (1..=16).collect();
    assert_eq!(set(FeatureId::HOST_IDENTIFIER, 1, &id), Status::SUCCESS);
    assert_eq!(get(FeatureId::HOST_IDENTIFIER, 1), id);
    assert_eq!(get(FeatureId::HOST_IDENTIFIER, 0), id[..8]);
    let mut behavior = vec![0; 512];
    behavior[0] = 1;
    assert_eq!(
        set(FeatureId::HOST_BEHAVIOR_SUPPORT, 0, &behavior),
        Status::SUCCESS
    );
    assert_eq!(get(FeatureId::HOST_BEHAVIOR_SUPPORT, 0), behavior);
    behavior[2] = 2;
    assert_eq!(
        set(FeatureId::HOST_BEHAVIOR_SUPPORT, 0, &behavior),
        Status::INVALID_FIELD
    );
    host.must_work();
}

#[test]
fn a_host_gets_no_more_queues_than_there_are_and_asks_before_it_makes_any() {
    let host = Host::new();
    let ask = |value| host.tell(set_feature(FeatureId::NUMBER_OF_QUEUES.0, value), &[]);
    assert_eq!(ask(0x0003_0001), (Status::SUCCESS, 0x0003_0001));
    assert_eq!(ask(0x00ff_00ff), (Status::SUCCESS, 0x000f_000f));
    assert_eq!(
        host.tell(get_feature(FeatureId::NUMBER_OF_QUEUES.0, 0, 0), &[]).1,
        0x000f_000f
    );
    assert_eq!(ask(0xffff).0, Status::INVALID_FIELD);
    assert_eq!(ask(0xffff_0000).0, Status::INVALID_FIELD);
    assert_eq!(
        host.tell(entry(AdminOpcode::CREATE_IO_CQ.0, 0), &[]).0,
        Status::SUCCESS
    );
    assert_eq!(ask(1).0, Status::COMMAND_SEQUENCE_ERROR);
    host.controller.reset();
    assert_eq!(ask(1), (Status::SUCCESS, 1));
    host.must_work();
}

#[test]
fn without_write_cache_writes_are_durable_at_once_and_nothing_else_changes() {
    let host = Host::new();
    assert_eq!(
        host.tell(set_feature(FeatureId::VOLATILE_WRITE_CACHE.0, 0), &[])
            .0,
        Status::SUCCESS
    );
    host.must_work();
    assert_eq!(
        host.tell(set_feature(FeatureId::VOLATILE_WRITE_CACHE.0, 1), &[])
            .0,
        Status::SUCCESS
    );
    for opcode in [Opcode::WRITE, Opcode::READ, Opcode::WRITE_ZEROES] {
        let mut command = rw(opcode.0, PLAIN_NSID, 0, 8);
        command.cdw12 = (7 | 1 << 30).into();
        assert_eq!(host.send(command, &[]), Status::SUCCESS, "{opcode:?} with FUA");
    }
    host.must_work();
}

#[test]
fn keep_alives_are_counted_and_their_timeout_is_told_where_somebody_watches() {
    let host = Host::new();
    assert_eq!(
        host.tell(set_feature(FeatureId::KEEP_ALIVE_TIMER.0, 1500), &[]).0,
        Status::INVALID_FIELD
    );
    assert_eq!(
        host.tell(entry(AdminOpcode::KEEP_ALIVE.0, 0), &[]).0,
        Status::INVALID_OPCODE
    );
    drop(host);
    let options = ControllerOptions {
        keep_alive: true,
        ..ControllerOptions::default()
    };
    let host = Host::with(
        &host::BOTH.map(|graph| (graph, NamespaceOptions::default())),
        options,
        host::ENABLE,
    );
    assert_eq!(host.ask(identify(1, 0, 0))[320], 10);
    assert_eq!(host.controller.keep_alive_timeout(), None);
    host.tell(set_feature(FeatureId::KEEP_ALIVE_TIMER.0, 1500), &[]);
    assert_eq!(host.controller.keep_alive_timeout().unwrap().as_millis(), 1500);
    assert_eq!(
        host.tell(entry(AdminOpcode::KEEP_ALIVE.0, 0), &[]).0,
        Status::SUCCESS
    );
    assert_eq!(host.controller.keep_alives(), 1);
    host.must_work();
}
