use super::*;

const FAMILY: Family = Family { id: 0x1d, group: 9 };

/// Bytes as a little-endian machine sends them; one line for each header or attribute.
fn golden(lines: &[&str]) -> Vec<u8> {
    lines
        .iter()
        .flat_map(|line| line.split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

fn only_message(datagram: &[u8]) -> Message<'_> {
    let mut messages = Messages(datagram);
    let message = messages.next().unwrap().unwrap();
    assert!(messages.next().is_none());
    message
}

#[test]
fn the_family_is_asked_for_by_name() {
    let expected = golden(&[
        "1c 00 00 00  10 00  05 00  01 00 00 00  00 00 00 00",
        "03 01 00 00",
        "08 00 02 00  6e 62 64 00",
    ]);
    assert_eq!(find_family(1), expected);
}

#[test]
fn connect_says_everything_about_the_device() {
    let device = Connect {
        size_bytes: 0x0000_0001_4000_0000,
        block_size_bytes: 512,
        timeout_seconds: 10,
        dead_timeout_seconds: 600,
        server_flags: 0x016d,
        backend: "hawser:v",
    };
    let expected = golden(&[
        "7c 00 00 00  1d 00  05 00  02 00 00 00  00 00 00 00",
        "01 01 00 00",
        "0c 00 02 00  00 00 00 40 01 00 00 00",
        "0c 00 03 00  00 02 00 00 00 00 00 00",
        "0c 00 04 00  0a 00 00 00 00 00 00 00",
        "0c 00 08 00  58 02 00 00 00 00 00 00",
        "0c 00 05 00  6d 01 00 00 00 00 00 00",
        "1c 00 07 80",
        "0c 00 01 80  08 00 01 00  07 00 00 00",
        "0c 00 01 80  08 00 01 00  08 00 00 00",
        "0d 00 0a 00  68 61 77 73 65 72 3a 76 00  00 00 00",
    ]);
    assert_eq!(FAMILY.connect(2, &device, &[7, 8]), expected);
}

#[test]
fn disconnect_names_the_index_alone() {
    let expected = golden(&[
        "1c 00 00 00  1d 00  05 00  03 00 00 00  00 00 00 00",
        "02 01 00 00",
        "08 00 01 00  03 00 00 00",
    ]);
    assert_eq!(FAMILY.disconnect(3, 3), expected);
}

#[test]
fn m8_reconfigure_always_has_the_backend() {
    let backend = "08 00 0a 00  61 62 63 00";
    let header = "05 00  04 00 00 00  00 00 00 00  03 01 00 00  08 00 01 00  05 00 00 00";
    assert_eq!(
        FAMILY.check(4, 5, "abc"),
        golden(&["24 00 00 00  1d 00", header, backend])
    );
    assert_eq!(
        FAMILY.resize(4, 5, "abc", 4096),
        golden(&[
            "30 00 00 00  1d 00",
            header,
            backend,
            "0c 00 02 00  00 10 00 00 00 00 00 00",
        ])
    );
    assert_eq!(
        FAMILY.offer(4, 5, "abc", 9),
        golden(&[
            "34 00 00 00  1d 00",
            header,
            backend,
            "10 00 07 80  0c 00 01 80  08 00 01 00  09 00 00 00",
        ])
    );
}

#[test]
fn the_controllers_answer_has_family_and_group() {
    // As kernel 6.1 answers: name, id, version, header size, highest attribute, then groups.
    let answer = golden(&[
        "6c 00 00 00  10 00  00 00  01 00 00 00  d2 04 00 00",
        "01 02 00 00",
        "08 00 02 00  6e 62 64 00",
        "06 00 01 00  1d 00 00 00",
        "08 00 03 00  01 00 00 00",
        "08 00 04 00  00 00 00 00",
        "08 00 05 00  0a 00 00 00",
        "30 00 07 80",
        "0c 00 01 80  08 00 02 00  05 00 00 00",
        "20 00 02 80  08 00 02 00  09 00 00 00",
        "11 00 01 00  6e 62 64 5f 6d 63 5f 67 72 6f 75 70 00  00 00 00",
    ]);
    let Message::Generic { attributes, .. } = only_message(&answer) else {
        panic!("{answer:x?}");
    };
    assert_eq!(Family::parse(attributes), Ok(Some(FAMILY)));
}

#[test]
fn errors_and_acknowledgements_are_told_apart() {
    let header = "24 00 00 00  02 00  00 00  07 00 00 00  d2 04 00 00";
    let refused = golden(&[
        header,
        "f0 ff ff ff",
        "1c 00 00 00  1d 00  05 00  07 00 00 00  00 00 00 00",
    ]);
    assert_eq!(
        only_message(&refused),
        Message::Done {
            sequence: 7,
            errno: 16
        }
    );
    let done = golden(&[
        header,
        "00 00 00 00",
        "1c 00 00 00  1d 00  05 00  07 00 00 00  00 00 00 00",
    ]);
    assert_eq!(
        only_message(&done),
        Message::Done {
            sequence: 7,
            errno: 0
        }
    );
}

#[test]
fn an_index_is_found_in_its_own_message_only() {
    let announced = golden(&[
        "1c 00 00 00  1d 00  00 00  00 00 00 00  00 00 00 00",
        "04 00 00 00",
        "08 00 01 00  0c 00 00 00",
    ]);
    let message = only_message(&announced);
    assert_eq!(dead_link(&message), Some(12));
    assert_eq!(connected_index(&message), None);
}

#[test]
fn every_prefix_and_every_length_is_survived() {
    let datagram = golden(&[
        "1c 00 00 00  1d 00  00 00  00 00 00 00  00 00 00 00",
        "04 00 00 00",
        "08 00 01 00  0c 00 00 00",
    ]);
    for length in 1..datagram.len() {
        assert_eq!(
            Messages(&datagram[..length]).next(),
            Some(Err(Malformed)),
            "{length}"
        );
    }
    for wrong in 0..=u8::MAX {
        for position in [0, 20] {
            let mut datagram = datagram.clone();
            datagram[position] = wrong;
            let _ = Messages(&datagram)
                .filter_map(Result::ok)
                .filter_map(|message| dead_link(&message))
                .count();
        }
    }
}
