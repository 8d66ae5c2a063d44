# The VM's only "service": makes the devices, runs the command, reports how it ended.
# config.sh (written for each run) brings: lab_mounts, lab_modules, lab_devices, lab_command, LAB_NAME, LAB_DEVICES,
# LAB_SHELL, LAB_PORTS, and LAB_PATIENCE: with virtual time a sleep takes none, so that there have to be more of them.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
. /run/lab/config.sh

await() {
    tries=$((200 * LAB_PATIENCE))
    until [ -e $1 ]; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        busybox sleep 0.05
    done
}

say() {
    echo "$*" >&3
}

# Wait for the lab to end the VM: powering off could lose what is still on its way out. The port's end means that
# there is no lab any more.
end() {
    while read -r line <&3; do :; done
    busybox poweroff -f
}

fail() {
    say "failed $(echo "$*" | busybox tr '\n' ' ')"
    end
}

# Run a step; on failure report what it printed.
must() {
    output=$("$@" 2>&1) || fail "$*: $output"
}

busybox mount -t sysfs sys /sys
busybox mount -t debugfs debugfs /sys/kernel/debug
busybox mount -t tmpfs -o mode=1777 tmp /tmp
busybox mkdir -p /dev/pts /dev/shm
busybox mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
busybox mount -t tmpfs -o mode=1777 shm /dev/shm
[ -e /dev/fd ] || busybox ln -s /proc/self/fd /dev/fd
busybox hostname "$LAB_NAME"
busybox ip link set lo up

# The first number in a port's name counts virtio devices of all sorts.
await "${LAB_PORTS}1" || { echo "lab: no control port"; busybox poweroff -f; }
ports=$(echo ${LAB_PORTS}1)
ports=${ports%1}
exec 3<>"${ports}1"
say booted

echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled 2>/dev/null
lab_mounts
lab_modules
lab_devices
device=0
while [ $device -lt "$LAB_DEVICES" ]; do
    await /dev/vhost-vdpa-$device || fail "/dev/vhost-vdpa-$device did not appear"
    device=$((device + 1))
done

if [ "$LAB_SHELL" = 1 ]; then
    await /dev/hvc0 || fail "no console"
    say started
    (lab_command) </dev/hvc0 >/dev/hvc0 2>&1
    say "exit $? 0 0"
    end
fi

await "${ports}2" && await "${ports}3" || fail "no output ports"
busybox mkfifo /run/lab/out /run/lab/err
busybox dd bs=64k if=/run/lab/out of="${ports}2" 2>/run/lab/out.count &
out=$!
busybox dd bs=64k if=/run/lab/err of="${ports}3" 2>/run/lab/err.count &
err=$!
say started
(lab_command) </dev/null >/run/lab/out 2>/run/lab/err 3>&-
status=$?

# All output is out when both copiers have seen the end; something left in the background may hold it open.
tries=$((100 * LAB_PATIENCE))
while [ -e /proc/$out/fd/0 ] || [ -e /proc/$err/fd/0 ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || break
    busybox sleep 0.02
done
count() {
    counted=$(busybox sed -n 's/^\([0-9]*\) bytes .*/\1/p' "$1")
    echo "${counted:--1}"
}
say "exit $status $(count /run/lab/out.count) $(count /run/lab/err.count)"
end
