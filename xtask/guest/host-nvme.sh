# A zoned NVMe namespace by its character device: the rules of namespaces, the suites straight and through a door, each
# report compared with nvme-cli's; random write areas and descriptor extensions by zbdkit's commands and by nvme-cli's; the
# block device beside it; what is refused; a drive that is pulled out.
nvme
for ((i = 0; i < 100; i++)); do
	[ -c /dev/ng0n1 ] && [ -c /dev/ng0n2 ] && break
	sleep 0.1
done
# The kernel does not number them as the drive does.
for device in /dev/ng0n*; do
	if command nvme zns id-ns "$device" >/dev/null 2>&1; then zoned=$device; else plain=$device; fi
done
block=/dev/nvme${zoned#/dev/ng}
[ -c "$zoned" ] && [ -c "$plain" ] && [ -b "$block" ] || fail "the namespaces are not there"

echo "== the rules of zoned namespaces, by ring and by ioctl"
export ZBDKIT_TEST_NVME=$zoned
run /share/test-nvme --test-threads=1
ZBDKIT_IO=threads run /share/test-nvme --test-threads=1

echo "== commands really go by ring, but for Identify"
strace -f -o /tmp/trace /share/test-nvme --test-threads=1 drive_places_appends >/dev/null || fail "under strace"
grep -q 'io_uring_setup.*SQE128' /tmp/trace || fail "no ring for commands"
expect "I/O commands by ioctl" 0 "$(grep -c 'NVME_IOCTL_IO64_CMD' /tmp/trace)"

echo "== the suites"
run zbdkit-drive conform "$zoned"
run zbdkit-drive conform "$zoned" --door /usr/local/bin/zbdkit

# attributes ZONE: as nvme-cli shows them, in hexadecimal.
attributes() {
	command nvme zns report-zones "$zoned" -s $(($1 * 256)) -d 1 | sed -n 's/^SLBA.*Attrs: \(0x\)\?\([0-9a-f]*\) .*/\2/p'
}

# pointer ZONE: as nvme-cli shows it, in blocks from the zone's start.
pointer() {
	local wp
	wp=$(command nvme zns report-zones "$zoned" -s $(($1 * 256)) -d 1 | sed -n 's/^SLBA.* WP: \(0x[0-9a-f]*\) .*/\1/p')
	echo $((wp - $1 * 256))
}

echo "== random write areas: opened and written by zbdkit, seen and committed by nvme-cli, and the other way round"
run command nvme zns reset-zone --select-all "$zoned"
run zbdkit io "$zoned" -c 'zo -r 1M 1M' -c 'write -q -P 3 1036k 4k' -c 'write -q -P 1 1M 4k' -c 'write -q -P 2 1028k 8k'
expect "attributes of zone 1" 8 "$(attributes 1)"
expect "pointer of zone 1" 0 "$(pointer 1)"
run command nvme zns zrwa-flush-zone "$zoned" --lba $((256 + 3))
expect "pointer of zone 1" 4 "$(pointer 1)"
run zbdkit io "$zoned" -c 'read -q -P 1 1M 4k' -c 'read -q -P 2 1028k 8k' -c 'read -q -P 3 1036k 4k'
told "does not lie in the random write area" zbdkit io "$zoned" -c 'write -q 1M 4k'
told "has a random write area" zbdkit io "$zoned" -c 'zap 1M 4k'
run command nvme zns open-zone --zrwaa -s $((2 * 256)) "$zoned"
run zbdkit io "$zoned" -c 'write -q 2064k 4k' -c 'write -q 2M 16k' -c 'zcm 2064k'
expect "pointer of zone 2" 4 "$(pointer 2)"
told "no random write area is left" zbdkit io "$zoned" -c 'zo -r 3M 1M'
expect "zones with an area" 2 "$(zbdkit report "$zoned" | grep -c 'attributes: zrwa')"
run zbdkit reset -q "$zoned" --zone 1
expect "attributes of zone 1" 0 "$(attributes 1)"
run zbdkit io "$zoned" -c 'zo -r 3M 1M' -c 'write -q 3076k 4k' -c 'zf 3M 1M'
expect "attributes of zone 3" 0 "$(attributes 3)"

echo "== descriptor extensions: attached by zbdkit, read by nvme-cli, and the other way round"
# extension ZONE: as nvme-cli has it.
extension() {
	command nvme zns report-zones "$zoned" -e -s $(($1 * 256)) -d 1 -o binary | tail -c 64
}
head -c 64 /dev/urandom >/tmp/ours
head -c 64 /dev/urandom >/tmp/theirs
run zbdkit io "$zoned" -c 'zse -f /tmp/ours 4M'
expect "attributes of zone 4" 80 "$(attributes 4)"
run cmp /tmp/ours <(extension 4)
run command nvme zns set-zone-desc "$zoned" -s $((5 * 256)) -d /tmp/theirs
run zbdkit io "$zoned" -c 'zge -f /tmp/found 5M'
run cmp /tmp/theirs /tmp/found
zbdkit io "$zoned" -c 'zge 6M' | grep -q 'no descriptor extension' || fail "an extension from nowhere"
told "closed, which does not allow" zbdkit io "$zoned" -c 'zse 4M'
expect "extensions in the report" 2 "$(zbdkit report --json "$zoned" | jq '[.zones[] | select(.attributes.extension)] | length')"

echo "== what list and check say of them"
zbdkit check "$zoned" | tee /tmp/check
grep -q '^ok       random writes   random write areas of 64 KiB in 2 zones at a time' /tmp/check || fail "no areas"
grep -q '^ok       extensions      .* 64 bytes' /tmp/check || fail "no extensions"
zbdkit list --json | jq -e --arg path "$block" '.devices[] | select(.path == $path) | .zrwa.size == 65536 and .zrwa.max == 2 and .extension_size == 64' ||
	fail "list does not show them"
run command nvme zns reset-zone --select-all "$zoned"

echo "== the block device of the same namespace, and back"
run zbdkit-drive conform "$block"
run zbdkit-drive conform "$zoned"

echo "== what is not opened, and why"
told "not a zoned namespace" zbdkit io "$plain" -c 'zrp 0 1'
sectors=$(cat /sys/block/${block#/dev/}/size)
run dmsetup create taken --table "0 $sectors linear $block 0"
told "in use" zbdkit io "$zoned" -c 'zrp 0 1'
run dmsetup remove taken
zbdkit serve "$zoned" --vhost-user-blk /tmp/z.sock >/tmp/ready &
server=$!
while ! grep -q ready /tmp/ready; do
	kill -0 $server || fail "zbdkit serve ended"
	sleep 0.1
done
dmsetup create taken --table "0 $sectors linear $block 0" 2>/dev/null && fail "somebody else took the block device"
kill $server
wait $server || fail "zbdkit serve did not end well"

echo "== a drive that is pulled out"
run zbdkit-drive flood "$zoned" 'echo 1 >/sys/class/nvme/nvme0/device/remove'
