# The conformance suites on the kernel's own zoned devices, straight through the block layer and through a door.
# After each step zbdkit's report is compared with blkzone's.
install -D -t /usr/local/bin /share/zbdkit /share/zbdkit-drive || fail "no programs"

# null_blk OPTION=VALUE...: makes /dev/nullb0 anew.
null_blk() {
	local dir=/sys/kernel/config/nullb/nullb0 option
	if [ -d $dir ]; then
		echo 0 >$dir/power
		rmdir $dir
	fi
	modprobe null_blk nr_devices=0 || fail "no null_blk"
	mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
	mkdir $dir
	for option in size=64 memory_backed=1 zoned=1 zone_size=4 "$@"; do
		echo "${option#*=}" >"$dir/${option%=*}" || fail "null_blk: $option"
	done
	echo 1 >$dir/power || fail "null_blk refuses $*"
	udevadm settle
}

conform() {
	run zbdkit-drive conform "$1"
	run zbdkit-drive conform "$1" --door /usr/local/bin/zbdkit
}

echo "== null_blk: capacity below the zone size, conventional zones, limits, 4 KiB blocks"
null_blk blocksize=4096 zone_capacity=3 zone_nr_conv=2 zone_max_open=4 zone_max_active=6
conform /dev/nullb0

echo "== null_blk: 512-byte blocks, no limits"
null_blk blocksize=512
conform /dev/nullb0

echo "== scsi_debug: host-managed"
modprobe scsi_debug zbc=managed dev_size_mb=64 zone_size_mb=4 zone_nr_conv=2 zone_max_open=4 || fail "no scsi_debug"
udevadm settle
scsi=$(lsblk -dno NAME,MODEL | sed -n 's/ *scsi_debug.*//p')
[ -n "$scsi" ] || fail "scsi_debug has no disk"
conform "/dev/$scsi"

echo "== QEMU's nvme-ns"
run lsblk -z /dev/nvme0n1
conform /dev/nvme0n1

echo "== what is not opened, and why"
told() { # told WORDS COMMAND...
	local words=$1 said
	shift
	said=$("$@" 2>&1) && fail "this should have failed: $*"
	case "$said" in *"$words"*) echo "ok: $words" ;; *) fail "$* said: $said" ;; esac
}
told "requires cache.direct=on" zbdkit info --image-opts driver=host_device,filename=/dev/nullb0
told "driver=host_device" zbdkit info --image-opts driver=file,filename=/dev/nullb0
told "driver=file" zbdkit info --image-opts driver=host_device,filename=/etc/passwd
run mkfs.btrfs -q -O zoned -d single -m single -f /dev/nullb0 || true
if mkdir -p /mnt/z && mount /dev/nullb0 /mnt/z; then
	told "umount /mnt/z" zbdkit io /dev/nullb0 -c 'zrp 0 1'
	run zbdkit report /dev/nullb0
	run umount /mnt/z
fi
modprobe -r scsi_debug
modprobe scsi_debug zbc=managed dev_size_mb=64 zone_size_mb=4 physblk_exp=3 || fail "no scsi_debug"
udevadm settle
scsi=$(lsblk -dno NAME,MODEL | sed -n 's/ *scsi_debug.*//p')
told "write granularity of 4096 bytes" zbdkit serve "/dev/$scsi" --vhost-user-blk /tmp/z.sock
run zbdkit-drive conform "/dev/$scsi"

echo "== a window of whole zones"
null_blk blocksize=4096 zone_nr_conv=2
told "whole zones" zbdkit io -n --image-opts driver=raw,offset=4096,file.driver=host_device,file.filename=/dev/nullb0 -c 'zrp 0 1'
run zbdkit io -n --image-opts driver=raw,offset=8M,size=8M,file.driver=host_device,file.filename=/dev/nullb0 -c 'zap -p 0 4k 4k' -c 'zrp 0 2'
expect "zone 2 of the drive" 16 "$(ZONE_MB=4 DEV=/dev/nullb0 zone 2 | cut -d' ' -f1)"
