# fio on zbdkit's NVMe controller and on QEMU's, by turns in each round, 4 KiB at a time: medians of operations a second.
find_nvme 1 "QEMU NVMe Ctrl"
QEMU=$DEV
find_nvme 1
OURS=$DEV
ROUNDS=5

# measure DEVICE RW DEPTH: operations a second.
measure() {
	local kind=read
	[ "$2" != write ] || kind=write
	fio --name=fio --filename="$1" --direct=1 --ioengine=io_uring --zonemode=zbd --rw="$2" --bs=4k --iodepth="$3" --size=512M \
		--time_based --runtime=2 --output-format=json --output=/tmp/fio || fail "fio $*"
	jq ".jobs[0].$kind.iops | floor" /tmp/fio
}

median() { sort -n | sed -n "$((ROUNDS / 2 + 1))p"; }

for device in $OURS $QEMU; do
	run fio --name=fill --filename=$device --direct=1 --zonemode=zbd --rw=write --bs=1M --size=512M --minimal --output=/tmp/fill
done
printf '%-16s %10s %10s %7s\n' "4 KiB, depth" zbdkit QEMU ratio
for work in "randread 1" "randread 32" "write 1" "write 32"; do
	read -r rw depth <<<"$work"
	: >/tmp/ours
	: >/tmp/theirs
	for ((round = 0; round < ROUNDS; round++)); do
		# Who is first changes, too.
		if [ $((round % 2)) = 0 ]; then
			measure "$OURS" "$rw" "$depth" >>/tmp/ours
			measure "$QEMU" "$rw" "$depth" >>/tmp/theirs
		else
			measure "$QEMU" "$rw" "$depth" >>/tmp/theirs
			measure "$OURS" "$rw" "$depth" >>/tmp/ours
		fi
	done
	ours=$(median </tmp/ours) theirs=$(median </tmp/theirs)
	printf '%-16s %10s %10s %7s   ours: %s; QEMU: %s\n' "$rw $depth" "$ours" "$theirs" \
		"$(echo "scale=2; $ours / $theirs" | bc)" "$(tr '\n' ' ' </tmp/ours)" "$(tr '\n' ' ' </tmp/theirs)"
done
