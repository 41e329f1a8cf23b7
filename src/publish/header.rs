//! The container formats that must never be registered as raw.
//!
//! A "raw" image that really is a qcow2 with a backing file, or a vmdk, reads other files of a host as soon as
//! something trusts its header (CVE-2024-32498, OSSA-2023-002). What Glance checks on an upload is checked here. What
//! legitimately appears on a guest disk (partition tables, ISO, LUKS, file systems) counts as raw.
//!
//! The magic numbers are those that QEMU's block drivers probe for.

/// The name of the container format that `header`, the first bytes of a disk, belongs to; `None`: raw.
pub fn container_format(header: &[u8]) -> Option<&'static str> {
    const MAGICS: [(usize, &[u8], &str); 13] = [
        // versions 2 and 3 are told from 1 below
        (0, b"QFI\xfb\x00\x00\x00\x01", "qcow"),
        (0, b"QFI\xfb", "qcow2"),
        (0, b"QED\0", "qed"),
        (0, b"KDMV", "vmdk"),
        (0, b"COWD", "vmdk"),
        // seSparse
        (0, &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0], "vmdk"),
        (0, b"vhdxfile", "vhdx"),
        // dynamic and differencing disks have a copy of the footer in front; a fixed one has none there
        (0, b"conectix", "vhd"),
        (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
        (0, b"WithoutFreeSpace", "parallels"),
        (0, b"WithouFreSpacExt", "parallels"),
        (0, b"Bochs Virtual HD Image", "bochs"),
        (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    ];
    MAGICS
        .iter()
        .find(|(offset, magic, _)| header.get(*offset..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|(_, _, format)| *format)
        .or_else(|| is_vmdk_descriptor(header).then_some("vmdk"))
}

/// A text descriptor of a vmdk. QEMU skips comments and empty lines, and wants `version=` in the next line. Other tools
/// look for the comment that VMware writes first, or for keys of a descriptor in any order.
fn is_vmdk_descriptor(header: &[u8]) -> bool {
    const SIGNATURE: &[u8] = b"# disk descriptorfile";
    const KEYS: [&[u8]; 3] = [b"cid", b"parentcid", b"createtype"];
    let text = header.strip_prefix(b"\xef\xbb\xbf").unwrap_or(header);
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let mut is_first = true;
    for line in lines {
        if line.get(..SIGNATURE.len()).is_some_and(|start| start.eq_ignore_ascii_case(SIGNATURE)) {
            return true;
        }
        if line.starts_with(b"#") {
            continue;
        }
        // the text ends here, if it was one
        if line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return false;
        }
        let equals = line.iter().position(|byte| *byte == b'=').unwrap_or(line.len());
        let (key, value) = line.split_at(equals);
        let key = key.trim_ascii_end().to_ascii_lowercase();
        let value = value.get(1..).unwrap_or_default();
        let is_version = key == b"version" && !value.is_empty() && value.iter().all(u8::is_ascii_digit);
        if is_first && is_version || !value.is_empty() && KEYS.contains(&key.as_slice()) {
            return true;
        }
        is_first = false;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; 4096];
        disk[offset..offset + magic.len()].copy_from_slice(magic);
        disk
    }

    #[test]
    fn container_formats_are_recognised() {
        for (offset, magic, format) in [
            (0, &b"QFI\xfb\0\0\0\x01"[..], "qcow"),
            (0, b"QFI\xfb\0\0\0\x02", "qcow2"),
            (0, b"QFI\xfb\0\0\0\x03", "qcow2"),
            (0, b"QED\0", "qed"),
            (0, b"KDMV", "vmdk"),
            (0, b"COWD", "vmdk"),
            (0, b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
            (0, b"#\n\n  # x\r\nversion=3\r\nCID=1", "vmdk"),
            (0, b"CID=fffffffe\nversion=1\nparentCID=ffffffff\n", "vmdk"),
            (0, b"encoding=\"x\"\r\n\r\ncreateType = \"monolithicFlat\"\r\n", "vmdk"),
            (0, b"#\0\0\n# Disk DescriptorFile\n", "vmdk"),
            (0, b"vhdxfile", "vhdx"),
            (0, b"conectix", "vhd"),
            (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
            (0, b"WithoutFreeSpace\x02\0\0\0", "parallels"),
            (0, b"WithouFreSpacExt\x02\0\0\0", "parallels"),
            (0, b"Bochs Virtual HD Image\0\0\0", "bochs"),
            (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount", "cloop"),
        ] {
            let found = container_format(&with(offset, magic));
            assert_eq!(found, Some(format), "{}", String::from_utf8_lossy(magic));
        }
    }

    #[test]
    fn what_a_guest_writes_is_raw() {
        let mut disk = vec![0; 64 << 10];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[0x8001..0x8006].copy_from_slice(b"CD001");
        assert_eq!(container_format(&disk), None);
        assert_eq!(container_format(&with(0, b"LUKS\xba\xbe\0\x01")), None);
        assert_eq!(container_format(&with(0, b"# a shell script\nversion=1.2")), None);
        assert_eq!(container_format(&with(0, b"#!/bin/sh\nexec true\n")), None);
        assert_eq!(container_format(&with(0, b"\xeb\x3c\x90\0\0\nCID=1\n")), None);
        assert_eq!(container_format(&with(0, b"CID=\nincident=1\n")), None);
        assert_eq!(container_format(&[]), None);
        assert_eq!(container_format(&[0xff; 16]), None);
    }
}
