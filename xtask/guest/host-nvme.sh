# A zoned NVMe namespace by its character device: the rules of namespaces, the suites straight and through a door, each
# report compared with nvme-cli's; the block device beside it; what is refused; a drive that is pulled out.
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
