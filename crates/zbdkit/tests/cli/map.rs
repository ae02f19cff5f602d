//! `map`: the table and the JSON of qemu-img.

use crate::support::Bench;

#[test]
fn zones_end_where_they_are_written() {
    let bench = Bench::with_demo();
    bench
        .io(&["write -q 0 12k", "write -q 64M 8k", "zf 64M 64M"])
        .ok();
    assert_eq!(
        bench.run(&["map", "disk.raw"]).ok(),
        "Offset          Length          Mapped to       File\n\
         0               0x3000          0               disk.raw\n\
         0x4000000       0x2000          0x4000000       disk.raw\n"
    );
    assert_eq!(
        bench
            .run(&["map", "--json", "disk.raw", "--max-length", "128M"])
            .ok(),
        "[{ \"start\": 0, \"length\": 12288, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 0},\n\
         { \"start\": 12288, \"length\": 67096576, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \"compressed\": false},\n\
         { \"start\": 67108864, \"length\": 8192, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 67108864},\n\
         { \"start\": 67117056, \"length\": 67100672, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \"compressed\": false}]\n"
    );
    let window = ["map", "--output", "json", "disk.raw", "-s", "4k", "-l", "4k"];
    assert_eq!(
        bench.run(&window).ok(),
        "[{ \"start\": 4096, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 4096}]\n"
    );
}

#[test]
fn an_empty_range_is_an_entry_of_no_length() {
    let bench = Bench::with_demo();
    for args in [["-s", "1T"], ["-l", "0"]] {
        let run = bench
            .run(&[&["map", "--json", "disk.raw"], &args[..]].concat())
            .ok();
        assert!(
            run.ends_with("\"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \"compressed\": false}]\n"),
            "{run}"
        );
    }
    bench.run(&["map", "nothing"]).fails(1, "nothing");
    assert_eq!(bench.run(&["map", "--output", "xml", "disk.raw"]).status, Some(2));
}
