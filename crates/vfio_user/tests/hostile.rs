//! Whatever a client sends: it costs the client its own connection at most.

mod anything;

use anything::{Target, steps};
use proptest::prelude::*;
use zerocopy::IntoBytes;

/// How many; ZBDKIT_HOSTILE_CASES changes it.
fn cases() -> u32 {
    std::env::var("ZBDKIT_HOSTILE_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(400)
}

/// Addresses and sizes that meet each other now and then.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..4).prop_map(|page| page << 12),
        1 => Just(0x1_0000),
        1 => Just(u64::MAX),
        1 => any::<u64>(),
    ]
}

/// A step that a client could mean, with numbers of any kind.
fn step() -> impl Strategy<Value = Vec<u8>> {
    let numbers = (
        0u8..8,
        prop_oneof![4 => 0u32..4, 1 => any::<u32>()],
        any::<bool>(),
        any::<u8>(),
    );
    (0u8..12, numbers, prop::array::uniform3(word())).prop_map(|(which, numbers, [a, b, c])| {
        let (few, number, bit, byte) = numbers;
        match which {
            0 | 1 => steps::map(3, 0, a, b, bit),
            2 => steps::map(number, a, b, c, bit),
            3 => steps::unmap(if number == 0 { 2 } else { 0 }, a, b),
            4 => steps::set_irqs(if bit { 0x24 } else { number }, 2, number, few),
            5 => steps::ask(u16::from(few % 5) + 4, number),
            // Around the region's end.
            6 => steps::read(number, 0x3ff8 + u64::from(few), u32::from(byte % 16)),
            7 | 8 => steps::tell(few, a, number.into()),
            9 => steps::answer(),
            10 => steps::refuse(few, &[byte; 5][..usize::from(few).min(5)]),
            _ => steps::command(u16::from(byte % 18), [a, b, c].as_bytes(), few),
        }
    })
}

#[test]
fn whatever_a_client_sends_the_next_one_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let target = Target::new(directory.path());
    let input = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..600),
        prop::collection::vec(step(), 0..24).prop_map(|steps| {
            let mut input = vec![0];
            input.extend(steps.concat());
            input
        }),
    ];
    proptest!(ProptestConfig::with_cases(cases()), |(input in input)| {
        target.play(&input);
    });
    target.must_work();
}
