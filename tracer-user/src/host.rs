//! stand-in
use crate::probe_point::Emulation;
/// x
#[derive(Debug)]
pub struct Host {
    /// x
    pub kernel_release: String,
}
impl Host {
    /// x
    pub fn read() -> Self {
        Self {
            kernel_release: "6.18".into(),
        }
    }
    /// x
    pub fn check(&self) -> anyhow::Result<()> {
        Ok(())
    }
    /// x
    pub fn emulation(&self) -> Emulation {
        Emulation::of_kernel(6, 18)
    }
}
