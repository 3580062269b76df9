#!/bin/busybox sh
# The first process of a virtual machine: does what /plan says and tells the host on the console.
# Lines of its own begin with @vm; everything between a begin and its end is a section's output.
b=/bin/busybox
export PATH=/usr/bin HOME=/

$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev

# section NAME COMMAND…
section() {
    name=$1
    shift
    echo "@vm begin $name"
    "$@" 2>&1 </dev/null
    # The output may have ended in the middle of a line.
    printf '\n@vm end %s %s %s\n' "$name" $? "$($b cut -d' ' -f1 /proc/uptime)"
}

. /plan
section kernel-log $b dmesg
echo "@vm done"
$b poweroff -f
