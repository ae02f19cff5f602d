# zbdkit list and zbdkit check on real zoned devices, free and in use: what they show is what the kernel's own tools show.
DEV=/dev/nullb0 SIZE_MB=512 ZONE_MB=16 CAPACITY_MB=12 CONVENTIONAL=4 MAX_OPEN=6 MAX_ACTIVE=8 SECTOR_BYTES=4096
zonefs=/mnt

# shown DEVICE KEY: a figure of the list.
shown() {
	zbdkit list --json | jq -r --arg path "$1" ".devices[] | select(.path == \$path) | .$2"
}

# capacity DEVICE: that of its last zone in bytes, as blkzone has it.
capacity() {
	blkzone report "$1" | sed -n 's/.* cap 0x\([0-9a-f]*\),.*/\1/p' | tail -1 | { read -r cap && echo $((16#$cap * 512)); }
}

# figures DEVICE: the list's figures are the kernel's.
figures() {
	local queue=/sys/block/${1#/dev/}/queue
	expect "$1: model" "$(cat "$queue/zoned")" "$(shown "$1" model)"
	expect "$1: size" "$(blockdev --getsize64 "$1")" "$(shown "$1" size)"
	expect "$1: zone size" $(($(cat "$queue/chunk_sectors") * 512)) "$(shown "$1" zone_size)"
	expect "$1: zone capacity" "$(capacity "$1")" "$(shown "$1" zone_capacity)"
	expect "$1: zones" "$(blkzone report "$1" | wc -l)" "$(shown "$1" nr_zones)"
	expect "$1: max open" "$(cat "$queue/max_open_zones")" "$(shown "$1" max_open)"
	expect "$1: max active" "$(cat "$queue/max_active_zones")" "$(shown "$1" max_active)"
	expect "$1: logical block size" "$(blockdev --getss "$1")" "$(shown "$1" logical_block_size)"
	expect "$1: write granularity" "$(cat "$queue/zone_write_granularity")" "$(shown "$1" write_granularity)"
}

# usable DEVICE: the check says so, and changes nothing.
usable() {
	blkzone report "$1" >/tmp/before
	run zbdkit check "$1"
	run diff /tmp/before <(blkzone report "$1")
}

# hindered DEVICE ABOUT WORDS: the check fails, with a problem of that kind that says these words.
hindered() {
	zbdkit check "$1" >/tmp/check && fail "usable: $1"
	cat /tmp/check
	grep -q "^problem  $2 .*$3" /tmp/check || fail "no problem with $2: $3"
	grep -q "not usable as it is" /tmp/check || fail "not said"
}

echo "== null_blk, with conventional zones and a capacity below the zone size"
make_null_blk
run zbdkit list
figures "$DEV"
usable "$DEV"
expect "users" 0 "$(shown "$DEV" 'used_by | length')"

echo "== open elsewhere: a note"
exec 8<"$DEV"
run zbdkit check "$DEV" >/tmp/check
cat /tmp/check
grep -q "^note     in use .*open in bash" /tmp/check || fail "not said"
exec 8<&-

echo "== part of another device"
dmsetup create over --table "0 $((SIZE_MB * 2048)) linear $DEV 0" || fail "no dm-linear"
hindered "$DEV" "in use" "part of dm-0"
run dmsetup remove over

echo "== mounted"
run mkzonefs -f "$DEV" >/dev/null
run mount -t zonefs "$DEV" $zonefs
expect "users" "mounted at $zonefs" "$(shown "$DEV" 'used_by[0]')"
hindered "$DEV" "in use" "mounted at $zonefs"
run umount $zonefs
run blkzone reset "$DEV"
usable "$DEV"

echo "== without the right to open it"
chmod 660 "$DEV" && chgrp disk "$DEV"
user() { setpriv --reuid=1000 --regid=1000 --clear-groups zbdkit "$@"; }
run user list | tee /tmp/list
grep -q "^$DEV .* 16 MiB  *?  *6 " /tmp/list || fail "the capacity is not unknown"
user check "$DEV" >/tmp/check && fail "usable without permissions"
cat /tmp/check
grep -q "join the group disk" /tmp/check || fail "the group is not named"

echo "== an offline and a read-only zone"
echo $((5 * ZONE_MB * 2048)) >/sys/kernel/config/nullb/nullb0/zone_offline 2>/dev/null &&
	echo $((6 * ZONE_MB * 2048)) >/sys/kernel/config/nullb/nullb0/zone_readonly &&
	{ zbdkit check "$DEV" | grep "^note     zones .*1 read-only, 1 offline" || fail "not noted"; }
remove_null_blk

echo "== scsi_debug, host-managed"
modprobe scsi_debug zbc=managed dev_size_mb=256 zone_size_mb=8 zone_nr_conv=2 zone_max_open=4 sector_size=4096 ||
	fail "no scsi_debug"
udevadm settle
disk=/dev/$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/target*/*/block)
figures "$disk"
expect "drive" "Linux scsi_debug" "$(shown "$disk" vendor_model)"
usable "$disk"
run rmmod scsi_debug

echo "== scsi_debug, whose zones take larger writes than its blocks: a guest could not know"
modprobe scsi_debug zbc=managed dev_size_mb=256 zone_size_mb=8 sector_size=512 physblk_exp=3 || fail "no scsi_debug"
udevadm settle
disk=/dev/$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/target*/*/block)
figures "$disk"
hindered "$disk" vhost-user-blk "write granularity of 4096 bytes"
run rmmod scsi_debug

echo "== scsi_debug, host-aware, which Linux takes for an ordinary disk"
modprobe scsi_debug zbc=aware dev_size_mb=256 zone_size_mb=8 zone_nr_conv=2 || fail "no scsi_debug"
udevadm settle
disk=/dev/$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/target*/*/block)
run zbdkit list
expect "what Linux says" none "$(cat "/sys/block/${disk#/dev/}/queue/zoned")"
# scsi_debug of recent kernels leaves the field empty: its zones tell, to whoever may ask.
expect "model" host-aware "$(shown "$disk" model)"
expect "zones" 32 "$(shown "$disk" nr_zones)"
expect "zone size" $((8 << 20)) "$(shown "$disk" zone_size)"
case "$(sg_vpd -p bdc "$disk")" in
*ZONED=1*) ;;
*) expect "without the right to ask" "" "$(user list --json | jq -r --arg path "$disk" '.devices[] | select(.path == $path) | .model')" ;;
esac
run zbdkit check "$disk"
run rmmod scsi_debug

echo "== an NVMe namespace"
nvme
figures /dev/nvme0n1
expect "character device" /dev/ng0n1 "$(shown /dev/nvme0n1 nvme_generic)"
usable /dev/nvme0n1

zbdkit check --json /dev/nvme0n1 | jq -e '.usable and (.findings | length > 5)' || fail "no JSON"
