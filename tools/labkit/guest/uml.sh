#!/bin/sh
# First program under the debugging kernel: makes what a command expects, runs it, leaves what came of it in /lab/run.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
. /lab/run/config.sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t debugfs debugfs /sys/kernel/debug
mountpoint -q /dev || busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs -o mode=1777 tmp /tmp
busybox mount -t tmpfs -o mode=755 run /run
busybox mkdir -p /dev/pts /dev/shm
busybox mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
busybox mount -t tmpfs -o mode=1777 shm /dev/shm
[ -e /dev/fd ] || busybox ln -s /proc/self/fd /dev/fd
busybox ip link set lo up
# There are no huge pages here: an entry maps one small page, not a huge one.
modprobe vhost_vdpa max_iotlb_entries=1000000 && insmod /lab/run/vdpa_hwsim.ko || echo "lab: the module cannot be loaded"

# Through a pipe, so that nothing takes the console for a terminal.
{
    (lab_mounts && lab_command) 2>&1
    echo $? >/lab/run/status
} </dev/null | cat

# kmemleak names a block when a scan finds nothing that points to it, and not before it is some seconds old.
for scan in 1 2; do
    busybox sleep 6
    echo scan >/sys/kernel/debug/kmemleak
done
cat /sys/kernel/debug/kmemleak >/lab/run/leaks
rmmod vdpa_hwsim || echo "lab: the module cannot be unloaded"
dmesg >/lab/run/log
: >/lab/run/ended
busybox poweroff -f
