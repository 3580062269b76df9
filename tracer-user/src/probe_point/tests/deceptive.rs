//! Handmade functions, each with a reason against probing where it would be cheapest.

use super::*;

/// Assembles the hexadecimal lines, which end in a comment.
fn code(lines: &str) -> Vec<u8> {
    let bytes: Vec<&str> = lines
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .collect();
    hex(&bytes.join(" "))
}

#[test]
fn the_first_emulated_instruction_is_chosen() {
    let code = code(
        "f3 0f 1e fa # 0 endbr64
         55          # 4 push %rbp
         5d          # 5 pop %rbp
         c3          # 6 ret",
    );
    assert_eq!(chosen(probe_with_return(&code)), at(4, "rdi"));
    let point = choose(&probe_with_return(&code));
    assert_eq!(point.instruction, "push rbp");
    assert_eq!(point.class, ProbeClass::Emulated);
}

#[test]
fn without_an_emulated_instruction_the_entry_is_single_stepped() {
    let code = hex("48 89 f8 c3"); // mov %rdi,%rax; ret
    let point = choose(&probe(&code));
    assert_eq!((point.offset, point.class), (0, ProbeClass::SingleStepped));
    assert_eq!(point.instruction, "mov rax, rdi");
}

#[test]
fn no_code_at_all_is_probed_at_the_entry() {
    assert_eq!(chosen(probe(&[])), entry());
    assert_eq!(choose(&probe(&[])).class, ProbeClass::SingleStepped);
}

#[test]
fn an_instruction_that_the_kernel_refuses_is_no_place_but_the_entry() {
    // 66-prefixed jmp, then a push.
    let code = hex("31 c0 66 e9 00 00 55 5d c3");
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_loop_back_to_before_the_probe_would_hit_it_again() {
    let code = code(
        "31 c0       # 0 xor %eax,%eax
         ff c0       # 2 inc %eax
         55          # 4 push %rbp
         5d          # 5 pop %rbp
         75 fa       # 6 jne 2
         c3          # 8 ret",
    );
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_loop_back_to_the_probe_itself_would_hit_it_again() {
    let code = code(
        "31 c0       # 0 xor %eax,%eax
         55          # 2 push %rbp
         5d          # 3 pop %rbp
         75 fc       # 4 jne 2
         c3          # 6 ret",
    );
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_loop_behind_the_probe_is_harmless() {
    let code = code(
        "31 c0       # 0 xor %eax,%eax
         55          # 2 push %rbp
         5d          # 3 pop %rbp
         75 fd       # 4 jne 3
         c3          # 6 ret",
    );
    assert_eq!(chosen(probe(&code)), at(2, "rdi"));
}

#[test]
fn a_jump_to_the_entry_is_a_call() {
    let code = code(
        "31 c0       # 0 xor %eax,%eax
         55          # 2 push %rbp
         5d          # 3 pop %rbp
         75 fa       # 4 jne 0
         c3          # 6 ret",
    );
    assert_eq!(chosen(probe(&code)), at(2, "rdi"));
}

#[test]
fn a_jump_into_the_middle_of_an_instruction_counts() {
    let code = code(
        "48 c7 c0 01 02 03 04 # 0 mov $0x4030201,%rax
         55                   # 7 push %rbp
         5d                   # 8 pop %rbp
         eb f9                # 9 jmp 4",
    );
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_jump_hidden_in_bytes_that_linear_decoding_misreads_counts() {
    let code = code(
        "31 c0       # 0 xor %eax,%eax
         ff c0       # 2 inc %eax
         55          # 4 push %rbp
         74 01       # 5 je 8
         b8          # 7 would swallow the jump: mov $imm32,%eax
         eb f8       # 8 jmp 2
         90 90 c3",
    );
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_branch_that_may_divert_calls_is_as_far_as_the_walk_goes() {
    let code = code(
        "48 83 ff 10 # 0 cmp $16,%rdi
         e3 03       # 4 jrcxz 9, which is not emulated
         55          # 6 push %rbp
         5d          # 7 pop %rbp
         c3          # 8 ret
         c3          # 9 ret",
    );
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn an_overwritten_argument_is_lost() {
    for overwrite in [
        "31 ff",          // xor %edi,%edi
        "40 b7 01",       // mov $1,%dil
        "66 bf 01 00",    // mov $1,%di
        "48 0f 44 fe",    // cmove %rsi,%rdi
        "48 87 fe",       // xchg %rdi,%rsi
        "5f",             // pop %rdi
        "48 8d 7f 01",    // lea 1(%rdi),%rdi
        "89 ff",          // mov %edi,%edi clears the upper half
        "f3 aa",          // rep stos
        "48 0f b1 f7",    // cmpxchg %rsi,%rdi
        "48 ff cf",       // dec %rdi
        "48 0f c1 fe",    // xadd %rdi,%rsi
        "c4 e2 e3 f7 fe", // shlx %rbx,%rsi,%rdi
    ] {
        let code = hex(&format!("{overwrite} 55 5d c3"));
        assert_eq!(chosen(probe(&code)), entry(), "{overwrite}");
    }
}

#[test]
fn an_argument_is_found_in_the_register_that_it_was_copied_to() {
    // mov %rdi,%r12 (both encodings); xor %edi,%edi; nop
    for copy in ["49 89 fc", "4c 8b e7"] {
        let code = hex(&format!("{copy} 31 ff 90 c3"));
        assert_eq!(chosen(probe(&code)), at(5, "r12"));
    }
}

#[test]
fn the_original_register_is_preferred_while_it_holds() {
    let code = hex("48 89 f8 90 c3"); // mov %rdi,%rax; nop; ret
    assert_eq!(chosen(probe(&code)), at(3, "rdi"));
}

#[test]
fn a_copy_of_32_bits_is_no_copy() {
    let code = hex("89 f8 31 ff 90 c3"); // mov %edi,%eax; xor %edi,%edi; nop; ret
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_copy_that_is_overwritten_is_lost_too() {
    // mov %rdi,%rax; mov %rax,%rdx; xor %edi,%edi; xor %edx,%edx; nop; ret
    let kept = hex("48 89 f8 48 89 c2 31 ff 31 d2 90 c3");
    assert_eq!(chosen(probe(&kept)), at(10, "rax"));
    // and xor %eax,%eax
    let lost = hex("48 89 f8 48 89 c2 31 ff 31 d2 31 c0 90 c3");
    assert_eq!(chosen(probe(&lost)), entry());
}

#[test]
fn multiplication_loses_the_third_argument() {
    let code = hex("48 89 f8 48 f7 e6 90 c3"); // mov %rdi,%rax; mul %rsi; nop; ret
    let of = |args| {
        let request = Request {
            args,
            ..probe(&code)
        };
        choose(&request).offset
    };
    assert_eq!(of(&[0, 1]), 6);
    assert_eq!(of(&[0, 2]), 0);
}

#[test]
fn arguments_that_are_on_the_stack_are_ignored() {
    let code = hex("31 c0 90 c3");
    let request = Request {
        args: &[0, 6, 255],
        null_arg: Some(255),
        ..probe(&code)
    };
    assert_eq!(chosen(request), at(2, "rdi"));
}

#[test]
fn a_return_probe_needs_the_return_address_at_the_stack_pointer() {
    for change in [
        "6a 00",          // push $0
        "48 83 ec 08",    // sub $8,%rsp
        "48 8d 64 24 f8", // lea -8(%rsp),%rsp
        "c8 10 00 00",    // enter
        "48 89 3c 24",    // mov %rdi,(%rsp)
        "48 89 7c 24 fc", // mov %rdi,-4(%rsp)
        "40 88 7c 24 07", // mov %dil,7(%rsp)
        "48 89 3c c4",    // mov %rdi,(%rsp,%rax,8)
    ] {
        let code = hex(&format!("{change} 55 5d c3"));
        assert_eq!(chosen(probe_with_return(&code)), entry(), "{change}");
        assert_ne!(chosen(probe(&code)), entry(), "{change}");
    }
}

#[test]
fn what_lies_beside_the_return_address_may_be_written() {
    for beside in [
        "48 89 7c 24 08", // mov %rdi,8(%rsp)
        "48 89 7c 24 f8", // mov %rdi,-8(%rsp)
    ] {
        let code = hex(&format!("{beside} 55 5d c3"));
        assert_eq!(chosen(probe_with_return(&code)), at(5, "rdi"), "{beside}");
    }
}

#[test]
fn a_call_can_be_probed_but_not_passed() {
    let code = code(
        "48 83 ec 08    # 0 sub $8,%rsp
         e8 00 10 00 00 # 4 call
         90             # 9 nop
         c3             # 10 ret",
    );
    assert_eq!(chosen(probe(&code)), at(4, "rdi"));
    let request = Request {
        emulation: Emulation::conservative(),
        ..probe(&code)
    };
    assert_eq!(chosen(request), entry());
}

#[test]
fn a_five_byte_nop_is_not_probed_once_the_red_zone_is_in_use() {
    let nop = "0f 1f 44 00 00";
    let unused = hex(&format!("31 c0 {nop} c3"));
    assert_eq!(chosen(probe(&unused)), at(2, "rdi"));
    let used = hex(&format!("48 89 7c 24 f8 {nop} c3")); // mov %rdi,-8(%rsp)
    assert_eq!(chosen(probe(&used)), entry());
}

#[test]
fn a_direct_jump_is_followed() {
    let code = code(
        "40 b6 01       # 0 mov $1,%sil
         66 90          # 3 two-byte nop, not emulated by old kernels
         48 39 f7       # 5 cmp %rsi,%rdi
         c3             # 8 ret",
    );
    let old = |code| Request {
        emulation: Emulation::conservative(),
        ..probe(code)
    };
    assert_eq!(chosen(old(&code)), entry());
    assert_eq!(chosen(probe(&code)), at(3, "rdi"));
    // As the kernel emulates jumps, following one is of use only to spare null arguments the trap.
    let jumping = self::code(
        "eb 01          # 0 jmp 3
         cc             # 2 int3
         48 85 ff       # 3 test %rdi,%rdi
         74 02          # 6 je 10
         55             # 8 push %rbp
         5d             # 9 pop %rbp
         c3             # 10 ret",
    );
    assert_eq!(chosen(probe_of_free(&jumping)), at(8, "rdi"));
}

#[test]
fn a_jump_onto_itself_ends_the_walk() {
    assert_eq!(chosen(probe_of_free(&hex("eb fe"))), entry());
    assert_eq!(chosen(probe_of_free(&hex("90 90 eb fd"))), entry());
}

#[test]
fn null_arguments_are_spared_the_trap_when_they_fall_through() {
    let code = code(
        "48 85 ff       # 0 test %rdi,%rdi
         75 01          # 3 jne 6
         c3             # 5 ret
         48 31 c0       # 6 xor %rax,%rax
         55             # 9 push %rbp
         5d             # 10 pop %rbp
         c3             # 11 ret",
    );
    assert_eq!(chosen(probe_of_free(&code)), at(9, "rdi"));
    // To others, null is an argument like any other.
    assert_eq!(chosen(probe(&code)), at(3, "rdi"));
}

#[test]
fn comparing_with_zero_is_a_null_test() {
    for test in [
        "48 83 ff 00",          // cmp $0,%rdi
        "48 81 ff 00 00 00 00", // the same, with a 32-bit immediate
        "48 89 f8 48 85 c0",    // mov %rdi,%rax; test %rax,%rax
    ] {
        let code = hex(&format!("{test} 74 02 55 5d c3"));
        let behind = hex(test).len() as u64 + 2;
        assert_eq!(chosen(probe_of_free(&code)), at(behind, "rdi"), "{test}");
    }
}

#[test]
fn what_only_resembles_a_null_test_is_not_passed() {
    for test in [
        "48 85 f6 74",          // test %rsi,%rsi; je
        "85 ff 74",             // test %edi,%edi; je: null in its lower half only
        "40 84 ff 74",          // test %dil,%dil; je
        "48 85 f7 74",          // test %rsi,%rdi; je
        "48 83 ff 01 74",       // cmp $1,%rdi; je
        "48 85 ff ff c0 74",    // test %rdi,%rdi; inc %eax; je
        "48 85 ff 48 85 f6 74", // a second test in between
        "48 85 ff 78",          // test %rdi,%rdi; js
        "48 85 ff 7e",          // jle
        "48 85 ff e1",          // loope, which also counts
        "48 85 ff e3",          // jrcxz
        "31 ff 48 85 ff 74",    // xor %edi,%edi first
    ] {
        let code = hex(&format!("{test} 02 55 5d c3"));
        let (offset, _) = chosen(probe_of_free(&code));
        let branch = hex(test).len() as u64 - 1;
        assert!(offset <= branch, "{test}: {offset}");
    }
}

#[test]
fn flags_survive_moves_between_test_and_branch() {
    let code = hex("48 85 ff 48 89 f8 74 02 55 5d c3"); // test; mov %rdi,%rax; je; push
    assert_eq!(chosen(probe_of_free(&code)), at(8, "rdi"));
}

#[test]
fn a_null_side_that_comes_back_keeps_the_probe_before_the_test() {
    let code = code(
        "48 85 ff       # 0 test %rdi,%rdi
         74 03          # 3 je 8
         55             # 5 push %rbp
         5d             # 6 pop %rbp
         c3             # 7 ret
         eb fb          # 8 jmp 5",
    );
    assert_eq!(chosen(probe_of_free(&code)), at(3, "rdi"));
}

#[test]
fn a_second_way_to_the_followed_target_keeps_the_probe_before_the_test() {
    let code = code(
        "48 85 ff       # 0 test %rdi,%rdi
         75 03          # 3 jne 8
         74 01          # 5 je 8
         c3             # 7 ret
         55             # 8 push %rbp
         5d             # 9 pop %rbp
         c3             # 10 ret",
    );
    assert_eq!(chosen(probe_of_free(&code)), at(3, "rdi"));
}

#[test]
fn a_probe_far_behind_the_null_test_is_not_worth_it() {
    let far = "31 c0 ".repeat(NULL_TEST_REACH);
    let code = hex(&format!("48 85 ff 74 00 {far} 55 5d c3"));
    assert_eq!(chosen(probe_of_free(&code)), at(3, "rdi"));
    let near = "31 c0 ".repeat(NULL_TEST_REACH - 1);
    // je to the ret
    let code = hex(&format!("48 85 ff 74 10 {near} 55 5d c3"));
    assert_eq!(chosen(probe_of_free(&code)), at(19, "rdi"));
}

/// `xor %eax,%eax; push %rbp; pop %rbp`, then this.
fn ending_in(end: &str) -> Vec<u8> {
    hex(&format!("31 c0 55 5d {end}"))
}

#[test]
fn tail_calls_through_pointers_are_told_from_jumps_within_the_function() {
    for tail_call in [
        "ff 25 00 10 00 00",          // jmp *0x1000(%rip)
        "ff 67 10",                   // jmp *0x10(%rdi)
        "48 8b 07 48 8b 40 18 ff e0", // mov (%rdi),%rax; mov 0x18(%rax),%rax; jmp *%rax
        "48 8b 0f 48 89 c8 5b ff e1", // mov (%rdi),%rcx; mov %rcx,%rax; pop %rbx; jmp *%rcx
        "48 8b 0f 48 89 c8 ff e0",    // the same through the copy
        "e8 00 10 00 00 ff e0",       // call; jmp *%rax
        "5b 41 5c 41 ff e3",          // pop %rbx; pop %r12; jmp *%r11
        "48 83 c4 18 ff e1",          // add $0x18,%rsp; jmp *%rcx
        "c9 ff e2",                   // leave; jmp *%rdx
    ] {
        assert_eq!(chosen(probe(&ending_in(tail_call))).0, 2, "{tail_call}");
    }
    for unproven in [
        "48 63 04 82 48 01 d0 ff e0", // movslq (%rdx,%rax,4),%rax; add %rdx,%rax; jmp *%rax
        "48 63 04 82 48 01 d0 3e ff e0", // the same, notrack
        "ff 24 c5 00 10 00 00",       // jmp *0x1000(,%rax,8)
        "48 8b 04 c2 ff e0",          // mov (%rdx,%rax,8),%rax; jmp *%rax
        "ff 24 24",                   // jmp *(%rsp)
        "ff e0",                      // jmp *%rax, from nowhere
        "e8 00 10 00 00 ff e3",       // call; jmp *%rbx
        "eb 03 48 8b 07 ff e0",       // jmp over the load of the pointer
        "5b 74 00 ff e0",             // the teardown may have been jumped over
    ] {
        assert_eq!(chosen(probe(&ending_in(unproven))).0, 0, "{unproven}");
    }
}

#[test]
fn a_function_that_takes_the_address_of_its_own_code_keeps_the_probe_at_the_entry() {
    // lea -2(%rip) = 9,%rax; then a jump that would otherwise be a tail call.
    let code = ending_in("48 8d 05 fe ff ff ff ff 25 00 10 00 00");
    assert_eq!(chosen(probe(&code)), entry());
    // mov $0x1002,%eax
    let code = ending_in("b8 02 10 00 00 ff 25 00 10 00 00");
    assert_eq!(chosen(probe(&code)), entry());
}

#[test]
fn a_last_call_that_does_not_return_is_no_truncation() {
    assert_eq!(chosen(probe(&ending_in("e8 00 10 00 00"))).0, 2);
    assert_eq!(chosen(probe(&ending_in("0f 0b"))).0, 2); // ud2
    assert_eq!(chosen(probe(&ending_in("f4"))).0, 2); // hlt
    assert_eq!(chosen(probe(&ending_in("90"))).0, 0); // falls off the end
}

#[test]
fn bytes_that_are_no_instruction_keep_the_probe_at_the_entry() {
    assert_eq!(chosen(probe(&ending_in("06 c3"))), entry());
}

#[test]
fn a_function_too_large_to_examine_is_probed_at_its_entry() {
    let mut code = hex("31 c0 55");
    code.resize(MAX_CODE_BYTES - 1, 0x90);
    code.push(0xc3);
    assert_eq!(chosen(probe(&code)).0, 2);
    code.push(0xc3);
    assert_eq!(chosen(probe(&code)).0, 0);
}
