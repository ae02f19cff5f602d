# The conformance suites on the kernel's own zoned devices, straight through the block layer and through a door.
# After each step zbdkit's report is compared with blkzone's.
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

echo "== scsi_debug"
scsi_debug zone_nr_conv=2 zone_max_open=4
conform "$scsi"

echo "== QEMU's nvme-ns"
nvme
run lsblk -z /dev/nvme0n1
conform /dev/nvme0n1

echo "== a window of whole zones"
null_blk blocksize=4096 zone_nr_conv=2
below=file.driver=host_device,file.filename=/dev/nullb0
told "whole zones" zbdkit io -n --image-opts driver=raw,offset=4096,$below -c 'zrp 0 1'
run zbdkit io -n --image-opts driver=raw,offset=8M,size=8M,$below -c 'zap -p 0 4k 4k' -c 'zrp 0 2'
expect "zone 2 of the drive" "16 oi" "$(ZONE_MB=4 DEV=/dev/nullb0 zone 2)"

echo "== the verbs on a drive"
run zbdkit info /dev/nullb0
run zbdkit finish /dev/nullb0 --zone 5
expect "zone 5" fu "$(ZONE_MB=4 DEV=/dev/nullb0 zone 5 | cut -d' ' -f2)"
run zbdkit open /dev/nullb0 --zone 6
expect "zone 6" "0 oe" "$(ZONE_MB=4 DEV=/dev/nullb0 zone 6)"
run zbdkit close /dev/nullb0 --zone 6
expect "zone 6" "0 em" "$(ZONE_MB=4 DEV=/dev/nullb0 zone 6)"
run zbdkit reset /dev/nullb0 --all
expect "empty zones" 14 "$(blkzone report /dev/nullb0 | grep -c '(em)')"
expect "reports that differ" "" "$(diff <(zbdkit report /dev/nullb0) <(blkzone report /dev/nullb0))"

echo "== what is not opened, and why"
told "requires cache.direct=on" zbdkit report --image-opts driver=host_device,filename=/dev/nullb0
told "driver=host_device" zbdkit report --image-opts driver=file,filename=/dev/nullb0
told "driver=file" zbdkit report --image-opts driver=host_device,filename=/etc/passwd
null_blk zone_nr_conv=4
run mkzonefs /dev/nullb0
modprobe zonefs
mkdir -p /mnt/z
run mount -t zonefs /dev/nullb0 /mnt/z
told "umount /mnt/z" zbdkit io /dev/nullb0 -c 'zrp 0 1'
run zbdkit report /dev/nullb0
run umount /mnt/z
run zbdkit io /dev/nullb0 -c 'zap -p 16M 4k 4k'
scsi_debug physblk_exp=3
told "write granularity of 4096 bytes" zbdkit serve "$scsi" --vhost-user-blk /tmp/z.sock
run zbdkit-drive conform "$scsi"
told "only its contents" zbdkit convert -O qcow2 -o zone.mode=host-managed,zone.size=4M /dev/nullb0 /tmp/copy.qcow2
told "has no zones" zbdkit convert -O qcow2 /dev/nullb0 /tmp/copy.qcow2
run zbdkit convert -O qcow2 -o zone.mode=none /dev/nullb0 /tmp/copy.qcow2
