//! The zoned half of the client, through both engines, against a small device in this process.
//! The device is a few lines that keep only what shows in an answer; it is no oracle for zbdkit.

use std::collections::BTreeSet;
use std::time::Duration;

use virtio_bindings::virtio_blk as vb;
use zbdkit_testkit::client::loopback::{Answer, Device, Loopback};
use zbdkit_testkit::client::ring::Desc;
use zbdkit_testkit::client::{
    CONFIG_SIZE, Client, ClientError, EngineKind, Framing, Options, Request, Status, Zone, ZoneKind,
    ZoneState, feature, op,
};

const ZONES: usize = 4;
const ZONE_SECTORS: u64 = 256;
const ENGINES: [EngineKind; 2] = [EngineKind::Ours, EngineKind::VirtioDriver];
/// A request type that the device never completes.
const STUCK: u32 = 1000;

#[derive(Default)]
struct ZonedDevice {
    /// Write pointer and state of each zone.
    zones: [(u64, u8); ZONES],
    data: std::collections::BTreeMap<u64, Vec<u8>>,
}

impl ZonedDevice {
    fn new() -> Self {
        let zones = std::array::from_fn(|i| (i as u64 * ZONE_SECTORS, vb::VIRTIO_BLK_ZS_EMPTY as u8));
        ZonedDevice {
            zones,
            ..ZonedDevice::default()
        }
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), Status> {
        let zone = &mut self.zones[(sector / ZONE_SECTORS) as usize];
        if zone.0 != sector {
            return Err(Status::ZONE_UNALIGNED_WP);
        }
        *zone = (sector + data.len() as u64 / 512, vb::VIRTIO_BLK_ZS_IOPEN as u8);
        for (i, piece) in data.chunks(512).enumerate() {
            self.data.insert(sector + i as u64, piece.to_vec());
        }
        Ok(())
    }

    fn report(&self, sector: u64, room: usize) -> Vec<u8> {
        let first = (sector / ZONE_SECTORS) as usize;
        let count = (ZONES - first).min(room / 64 - 1);
        let mut report = vec![0; 64];
        report[0] = count as u8;
        for i in first..first + count {
            let mut entry = Vec::new();
            for word in [ZONE_SECTORS - 56, i as u64 * ZONE_SECTORS, self.zones[i].0] {
                entry.extend(word.to_le_bytes());
            }
            entry.extend([2, self.zones[i].1]);
            entry.resize(64, 0);
            report.extend(entry);
        }
        report
    }
}

impl Device for ZonedDevice {
    fn features(&self) -> u64 {
        feature::ZONED | feature::FLUSH | feature::BLK_SIZE
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        config[..8].copy_from_slice(&(ZONES as u64 * ZONE_SECTORS).to_le_bytes());
        config[72..76].copy_from_slice(&(ZONE_SECTORS as u32).to_le_bytes());
        config[92] = 1;
        config
    }

    fn accepts(&self, features: u64) -> bool {
        features & feature::ZONED != 0
    }

    fn request(&mut self, op: u32, sector: u64, out: &[u8], room: usize) -> Option<Answer> {
        let index = ((sector / ZONE_SECTORS) as usize).min(ZONES - 1);
        let start = index as u64 * ZONE_SECTORS;
        let mut data = Vec::new();
        let mut set = |wp: Option<u64>, state: u32| {
            self.zones[index] = (wp.unwrap_or(self.zones[index].0), state as u8);
            Ok(())
        };
        let result = match op {
            op::READ => {
                let sectors = sector..sector + room as u64 / 512;
                data = sectors
                    .flat_map(|s| self.data.get(&s).cloned().unwrap_or(vec![0; 512]))
                    .collect();
                Ok(())
            }
            op::WRITE => self.write(sector, out),
            op::ZONE_APPEND => {
                let at = self.zones[index].0;
                data = at.to_le_bytes().to_vec();
                self.write(at, out)
            }
            op::ZONE_REPORT => {
                data = self.report(sector, room);
                Ok(())
            }
            op::ZONE_OPEN => set(None, vb::VIRTIO_BLK_ZS_EOPEN),
            op::ZONE_CLOSE => set(None, vb::VIRTIO_BLK_ZS_CLOSED),
            op::ZONE_FINISH => set(None, vb::VIRTIO_BLK_ZS_FULL),
            op::ZONE_RESET => set(Some(start), vb::VIRTIO_BLK_ZS_EMPTY),
            op::ZONE_RESET_ALL => {
                *self = ZonedDevice::new();
                Ok(())
            }
            STUCK => return None,
            _ => Err(Status::UNSUPP),
        };
        Some((result.err().unwrap_or(Status::OK).0, data))
    }
}

fn served(test: impl FnOnce(&std::path::Path)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let _server = Loopback::start(&path, ZonedDevice::new(), true).unwrap();
    test(&path);
}

fn zone(index: u64, wp: u64, state: ZoneState) -> Zone {
    let start = index * ZONE_SECTORS;
    Zone {
        start,
        cap: ZONE_SECTORS - 56,
        wp: start + wp,
        kind: ZoneKind::SequentialRequired,
        state,
    }
}

#[test]
fn zone_requests_and_reports_arrive_as_sent() {
    for engine in ENGINES {
        served(|path| {
            let mut client = Client::connect(
                path,
                &Options {
                    engine,
                    ..Options::default()
                },
            )
            .unwrap();
            assert_ne!(client.features() & feature::ZONED, 0);
            let config = *client.config();
            assert_eq!((config.zone_sectors, config.model), (ZONE_SECTORS as u32, 1));
            let queue = client.queue(0);
            queue.zone_open(0).unwrap();
            queue.write(ZONE_SECTORS, &[7; 4096]).unwrap();
            queue.zone_close(ZONE_SECTORS).unwrap();
            assert_eq!(
                queue.zone_append(ZONE_SECTORS, &[8; 1024]).unwrap(),
                ZONE_SECTORS + 8
            );
            queue.zone_finish(2 * ZONE_SECTORS).unwrap();
            let all = queue.zone_report_all(config.capacity, ZONE_SECTORS).unwrap();
            let expected = [
                zone(0, 0, ZoneState::ExplicitlyOpen),
                zone(1, 10, ZoneState::ImplicitlyOpen),
                zone(2, 0, ZoneState::Full),
                zone(3, 0, ZoneState::Empty),
            ];
            assert_eq!(all, expected);
            assert_eq!(queue.zone_report(ZONE_SECTORS + 9, 2).unwrap(), expected[1..3]);
            assert_eq!(
                queue.read(ZONE_SECTORS + 7, 1024).unwrap(),
                [[7; 512], [8; 512]].concat()
            );
            let wrong = queue
                .write(0, &[0; 512])
                .and_then(|()| queue.write(9, &[0; 512]))
                .unwrap_err();
            assert!(
                matches!(wrong, ClientError::Status(Status::ZONE_UNALIGNED_WP)),
                "{wrong}"
            );
            queue.zone_reset(ZONE_SECTORS).unwrap();
            assert_eq!(
                queue.zone_report(ZONE_SECTORS, 1).unwrap(),
                [zone(1, 0, ZoneState::Empty)]
            );
            queue.zone_reset_all().unwrap();
            let all = queue.zone_report_all(config.capacity, ZONE_SECTORS).unwrap();
            assert!(all.iter().all(|z| z.state == ZoneState::Empty));
        });
    }
}

#[test]
fn appends_in_flight_get_their_own_sectors_in_every_framing() {
    let framings = [
        Framing::default(),
        Framing::LINUX,
        Framing {
            chunk: Some(3),
            indirect: true,
            append_pad: 7,
            ..Framing::default()
        },
        Framing {
            merge_header: true,
            append_pad: 3,
            ..Framing::default()
        },
    ];
    for engine in ENGINES {
        for framing in framings {
            if engine == EngineKind::VirtioDriver && framing.chunk.is_some() {
                continue; // More descriptors than its ring has, and it has no indirect tables.
            }
            served(|path| {
                let options = Options {
                    engine,
                    slots: 24,
                    ..Options::default()
                };
                let mut client = Client::connect(path, &options).unwrap();
                let queue = client.queue(0);
                queue.set_framing(framing);
                let mut sent = Vec::new();
                for i in 0..24u8 {
                    let request = Request::ZoneAppend {
                        sector: ZONE_SECTORS,
                        data: vec![i; 1024],
                    };
                    sent.push((queue.submit(&request).unwrap(), i));
                }
                let mut sectors = BTreeSet::new();
                for (ticket, i) in sent {
                    let done = queue.wait_ticket(ticket).unwrap();
                    assert_eq!(done.status, Status::OK, "{framing:?}");
                    assert!(sectors.insert(done.append_sector));
                    assert_eq!(queue.read(done.append_sector, 1024).unwrap(), [i; 1024]);
                }
                assert_eq!(sectors, (0..24).map(|i| ZONE_SECTORS + 2 * i).collect());
            });
        }
    }
}

#[test]
fn a_server_that_wants_zoned_refuses_in_both_ways() {
    use zbdkit_testkit::client::channel::protocol_feature;
    served(|path| {
        let features = feature::ALL & !feature::ZONED;
        let error = Client::connect(
            path,
            &Options {
                features,
                ..Options::default()
            },
        )
        .unwrap_err();
        assert!(
            matches!(
                error,
                ClientError::Refused {
                    message: "SET_FEATURES",
                    ..
                }
            ),
            "{error}"
        );
        // Without acknowledgements, only the device status tells.
        let protocol_features = Options::default().protocol_features & !protocol_feature::REPLY_ACK;
        let options = Options {
            features,
            protocol_features,
            ..Options::default()
        };
        let error = Client::connect(path, &options).unwrap_err();
        assert!(matches!(error, ClientError::FeaturesNotOk { .. }), "{error}");
        Client::connect(path, &Options::default())
            .unwrap()
            .queue(0)
            .zone_reset_all()
            .unwrap();
    });
}

#[test]
fn a_request_that_hangs_times_out_and_others_go_on() {
    for engine in ENGINES {
        served(|path| {
            let mut client = Client::connect(
                path,
                &Options {
                    engine,
                    ..Options::default()
                },
            )
            .unwrap();
            let queue = client.queue(0);
            queue.set_patience(Duration::from_millis(50));
            let stuck = Request::Other {
                op: STUCK,
                sector: 0,
                out: vec![],
                in_len: 0,
            };
            assert!(matches!(queue.run(&stuck), Err(ClientError::Timeout(_))));
            assert_eq!(queue.run(&Request::Flush).unwrap().status, Status::UNSUPP);
            assert_eq!(queue.in_flight(), 1);
        });
    }
}

#[test]
fn a_chain_that_is_used_twice_is_noticed() {
    served(|path| {
        let mut client = Client::connect(path, &Options::default()).unwrap();
        let scratch = client.scratch().clone();
        scratch.write(0, &op::READ.to_le_bytes());
        let ring = client.queue(0).ring().unwrap();
        let ids = ring.reserve(2).unwrap();
        Desc {
            addr: scratch.guest(),
            len: 16,
            flags: 1,
            next: ids[1],
        }
        .store(ring.descriptors(), ids[0].into());
        Desc {
            addr: scratch.guest() + 64,
            len: 1,
            flags: 2,
            next: 0,
        }
        .store(ring.descriptors(), ids[1].into());
        // Available twice, so used twice: as one that a device makes up would look.
        ring.push_by_hand(ids[0]);
        ring.push_by_hand(ids[0]);
        let twice = client.queue(0).wait_by_hand().unwrap_err();
        assert!(
            matches!(twice, ClientError::UnexpectedUsed(head) if head == u32::from(ids[0])),
            "{twice}"
        );
    });
}
