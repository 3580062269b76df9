//! Mappings that a program makes itself, in pieces and over each other.

use unfreed_tests::{
    books::{Books, Counts, field},
    fixture::Fixture,
    machine,
    report::{books_through_any_frame, family_of, sites_of},
    skip,
    target::Target,
    unfreed::Unfreed,
};

#[test]
fn mappings_are_counted_in_pieces_and_the_allocators_own_are_not() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&Fixture::new("ranges.c").build(), &[]);
    let session = Unfreed::attach(&[target.pid()])
        .options(["--mappings"])
        .start()
        .tracing();
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    report.assert_nothing_missed();
    let process = report.process(target.pid());
    let (mapped, heap): (Vec<_>, Vec<_>) =
        sites_of(process).partition(|site| family_of(site) == Some("mapping"));
    let seen = books_through_any_frame(mapped.iter().copied());
    let expected = Books(
        target
            .books()
            .0
            .into_iter()
            .filter(|(site, _)| site != "site_allocator")
            .collect(),
    );
    expected.assert_equal(&seen, report);
    assert!(
        mapped.iter().all(|site| site["stack_cut"].is_null()),
        "{report}"
    );
    // malloc maps a mebibyte for itself, fifty times.
    let of_malloc = books_through_any_frame(heap.iter().copied());
    assert_eq!(of_malloc.of("site_allocator").allocs, 50);
    assert_eq!(field(&process["totals"], "live_blocks"), 0);
    let family = &process["families"][0];
    assert_eq!(family["name"], "mapping");
    assert_eq!(Counts::of_report(&family["totals"]), expected.sum());
}

#[test]
fn mappings_alone_can_be_counted() {
    if !skip::is_root() {
        return;
    }
    let _turn = machine::share();
    let mut target = Target::start(&Fixture::new("ranges.c").build(), &[]);
    let session = Unfreed::attach(&[target.pid()])
        .options(["--mappings", "--no-heap"])
        .start()
        .tracing();
    target.work();
    let outcome = session.stop();
    let report = outcome.report_with_code(0);
    let process = report.process(target.pid());
    assert_eq!(field(&process["totals"], "allocs"), 0, "{report}");
    assert!(
        field(&process["families"][0]["totals"], "allocs") > 200,
        "{report}"
    );
}
