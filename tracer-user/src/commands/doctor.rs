//! stand-in
/// x
pub fn doctor(_: &crate::args::Doctor) -> anyhow::Result<std::process::ExitCode> {
    Ok(std::process::ExitCode::SUCCESS)
}
