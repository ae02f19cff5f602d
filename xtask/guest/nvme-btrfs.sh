# One of several boots of a machine that comes to a bad end again and again. TASK: make a file system, write until the end,
# or check. What was synced is noted on the host, in /share/synced, and must be there in every later boot.
boot=$(($(cat /share/boots 2>/dev/null || echo 0) + 1))
echo $boot >/share/boots
find_nvme 1
modprobe btrfs

if [ "$TASK" = make ]; then
	run mkfs.btrfs -q -f -O zoned -d single -m single "$DEV"
	: >/share/synced
fi
echo "== boot $boot: $(wc -l </share/synced) files were synced"
run mount -t btrfs "$DEV" /mnt
[ "$TASK" = make ] || run sha256sum --quiet -c /share/synced

# fill NUMBER: writes the next file, with what must be found again.
fill() {
	local file=/mnt/boot$boot-$1
	head -c $((RANDOM * 64 + 1)) /dev/urandom >$file || fail "cannot write $file"
	# A file that is there again.
	[ $(($1 % 4)) != 3 ] || cp --reflink=never /mnt/boot$boot-$(($1 - 1)) $file.copy || fail "cannot copy"
	sync $file || fail "cannot sync $file"
	sha256sum $file >>/share/synced
	echo "boot $boot: $1 files synced"
}

case $TASK in
make)
	for ((i = 1; i <= 6; i++)); do fill $i; done
	run umount /mnt
	;;
write)
	# Two that are not noted keep the drive busy.
	while :; do head -c 3M /dev/urandom >/mnt/busy; done &
	while :; do
		head -c 64k /dev/urandom >/mnt/small
		sync -d /mnt/small
	done &
	for ((i = 1; ; i++)); do
		[ "$(df --output=avail -m /mnt | tail -1)" -gt 300 ] || fail "the drive is full before the end came"
		fill $i
	done
	;;
check)
	run umount /mnt
	# Not by scrubbing: in Linux 7.3 it can wait for a lock of chunks that it holds itself, with no request under way.
	run btrfs check --readonly --check-data-csum "$DEV"
	expect "zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | wc -l)"
	blkzone report "$DEV" | grep -E '\((ro|of)\)' && fail "a zone has died"
	while read -r z wptr condition; do
		[ "$condition" = cl ] && [ $((wptr + 128)) -le $((ZONE_MB * 2048)) ] || continue
		unwritten "$z" $((wptr * 512)) 64k
	done < <(zones)
	;;
esac
dmesg | grep -iE 'btrfs.*(error|corrupt|critical)|nvme.*timeout' && fail "the kernel complains"
exit 0
