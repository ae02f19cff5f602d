# null_blk OPTION=VALUE...: makes /dev/nullb0 anew, with 16 zones of 4 MiB unless told otherwise.
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

# scsi_debug OPTION=VALUE...: makes a host-managed disk anew; its name goes to $scsi.
scsi_debug() {
	modprobe -r scsi_debug
	modprobe scsi_debug zbc=managed dev_size_mb=64 zone_size_mb=4 "$@" || fail "no scsi_debug"
	udevadm settle
	scsi=/dev/$(lsblk -dno NAME,MODEL | sed -n 's/ *scsi_debug.*//p')
	[ -b "$scsi" ] || fail "scsi_debug has no disk"
}

# nvme: waits for QEMU's drive, /dev/nvme0n1.
nvme() {
	local i
	modprobe nvme || fail "no nvme"
	for ((i = 0; i < 100; i++)); do
		[ -b /dev/nvme0n1 ] && return
		sleep 0.1
	done
	fail "no NVMe drive"
}

install -D -t /usr/local/bin /share/zbdkit /share/zbdkit-drive || fail "no programs"
