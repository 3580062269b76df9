//! Allocation wrappers: functions that stand between the allocator and the code that wanted memory,
//! and are the same in every stack. A stack is read from the first frame that is none.
//!
//! Pools and arenas (nginx's `ngx_palloc`, PostgreSQL's `palloc`, APR's `apr_palloc`) are no
//! wrappers: what the allocator hands them serves many callers, of which the one in the stack only
//! happened to come first.

use super::demangle::without_parameters;
use crate::glob::matches;

/// Names of wrappers; `*` stands for any text. Of C++ and Rust, all of the standard libraries'
/// own: a container that grows is not where a leak is.
const KNOWN: &[&str] = &[
    // The C library: what gives memory to its caller.
    "malloc",
    "calloc",
    "realloc",
    "reallocarray",
    "memalign",
    "aligned_alloc",
    "posix_memalign",
    "strdup",
    "strndup",
    "__strdup",
    "__strndup",
    "wcsdup",
    "asprintf",
    "vasprintf",
    "__asprintf*",
    "__vasprintf*",
    "_IO_vasprintf",
    "getline",
    "getdelim",
    "__getdelim",
    "_IO_getdelim",
    // As many programs call those of their own.
    "xmalloc*",
    "xcalloc",
    "xrealloc*",
    "xreallocarray",
    "xnmalloc",
    "xnrealloc",
    "xzalloc",
    "x2realloc",
    "x2nrealloc",
    "xstrdup",
    "xstrndup",
    "xmemdup*",
    "xasprintf",
    "xvasprintf",
    "do_xmalloc*",
    "safe_malloc",
    "safe_calloc",
    "safe_realloc",
    "safe_strdup",
    "emalloc",
    "ecalloc",
    "erealloc",
    "estrdup",
    "my_malloc",
    "my_realloc",
    "my_strdup",
    // C++.
    "operator new",
    "operator new[]",
    "*::operator new",
    "*::operator new[]",
    "std::*",
    "__gnu_cxx::*",
    // Rust.
    "__rust_alloc*",
    "__rust_realloc",
    "__rustc::__rust_*",
    "__rdl_*",
    "__rg_*",
    "alloc::*",
    "<alloc::*",
    "<T as alloc::*",
    "core::*",
    "<core::*",
    "<T as core::*",
    "<I as core::*",
    "<std::*",
    "hashbrown::*",
    "<hashbrown::*",
    // GLib.
    "g_malloc*",
    "g_try_malloc*",
    "g_realloc*",
    "g_try_realloc*",
    "g_aligned_alloc*",
    "g_strdup*",
    "g_strndup",
    "g_memdup*",
    "g_slice_alloc*",
    "g_slice_copy",
    "g_vasprintf",
    // Python.
    "PyMem_*",
    "_PyMem_*",
    "PyObject_Malloc",
    "PyObject_Calloc",
    "PyObject_Realloc",
    "_PyObject_Malloc",
    "_PyObject_Calloc",
    "_PyObject_Realloc",
    "_PyObject_New",
    "_PyObject_GC_New*",
    "_PyObject_GC_Malloc",
    "_PyObject_GC_Alloc",
    "_PyObject_Arena*",
    "pymalloc_*",
    "allocate_from_new_pool",
    "new_arena",
    "gc_alloc",
    "PyType_GenericAlloc",
    "_PyType_AllocNoTrack",
    // Redis, nginx, Lua, PHP, libuv, Node, the JVM.
    "zmalloc*",
    "zcalloc*",
    "zrealloc*",
    "ztrymalloc*",
    "ztrycalloc*",
    "ztryrealloc*",
    "zstrdup",
    "hi_malloc",
    "hi_calloc",
    "hi_realloc",
    "hi_strdup",
    "ngx_alloc",
    "ngx_calloc",
    "ngx_memalign",
    "l_alloc",
    "luaM_malloc_",
    "luaM_realloc_",
    "luaM_saferealloc_",
    "luaM_growaux_",
    "__zend_malloc",
    "__zend_calloc",
    "__zend_realloc",
    "uv__malloc",
    "uv__calloc",
    "uv__realloc",
    "uv__strdup",
    "node::Malloc*",
    "node::Realloc*",
    "node::Unchecked*alloc*",
    "v8::base::*alloc*",
    "v8::internal::AllocWithRetry*",
    "os::malloc",
    "os::realloc",
    "AllocateHeap",
    "ReallocateHeap",
    // Libraries that many programs use.
    "CRYPTO_*alloc*",
    "CRYPTO_strdup",
    "CRYPTO_strndup",
    "CRYPTO_memdup",
    "sqlite3Malloc*",
    "sqlite3_malloc*",
    "sqlite3Realloc*",
    "sqlite3_realloc*",
    "sqlite3MemMalloc",
    "sqlite3MemRealloc",
    "sqlite3DbMalloc*",
    "sqlite3DbRealloc*",
    "sqlite3DbStrDup",
    "sqlite3DbStrNDup",
    "mallocWithAlarm",
    "dbMallocRawFinish",
    "dbReallocFinish",
    "xmlMemMalloc",
    "xmlStrdup",
    "xmlStrndup",
    "QArrayData::allocate*",
    "QArrayData::reallocate*",
    "av_malloc*",
    "av_calloc",
    "av_realloc*",
    "av_strdup",
    "av_strndup",
    "av_memdup",
    "SDL_malloc*",
    "SDL_calloc*",
    "SDL_realloc*",
    "SDL_strdup*",
    "Eigen::internal::*aligned_malloc",
    "cv::fastMalloc",
];

/// Functions of the standard libraries that call what the program handed them, which is often inlined
/// there: the program's own code begins with them, if nothing is before them.
const CALLERS: &[&str] = &[
    "*::__rust_begin_short_backtrace",
    "std::thread::_State_impl<*",
    "std::_Function_handler<*",
];

/// The wrappers that are known, and the user's own.
#[derive(Clone, Debug, Default)]
pub struct Wrappers {
    own: Vec<String>,
}

impl Wrappers {
    /// With the user's patterns beside those that are known.
    #[must_use]
    pub const fn new(own: Vec<String>) -> Self {
        Self { own }
    }

    /// Whether a function is a wrapper, by its name as in the source, with or without parameters.
    #[must_use]
    pub fn contains(&self, function: &str) -> bool {
        let bare = without_parameters(function);
        let is_one = |pattern: &str| matches(pattern, bare) || matches(pattern, function);
        let calls = CALLERS.iter().any(|pattern| is_one(pattern));
        let is_known = !calls && KNOWN.iter().any(|pattern| is_one(pattern));
        is_known || self.own.iter().any(|pattern| is_one(pattern))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_known_and_their_callers_are_not() {
        let wrappers = Wrappers::default();
        for wrapper in [
            "operator new(unsigned long)",
            "operator new[](unsigned long, std::nothrow_t const&)",
            "Pool::operator new(unsigned long)",
            "std::__cxx11::basic_string<char>::_M_create(unsigned long&, unsigned long)",
            "__gnu_cxx::new_allocator<int>::allocate(unsigned long, void const*)",
            "xmalloc",
            "g_strdup_printf",
            "_PyMem_RawMalloc",
            "PyObject_Malloc",
            "zmalloc",
            "alloc::raw_vec::RawVec<T,A>::grow_one",
            "<alloc::vec::Vec<T> as core::iter::Extend<T>>::extend",
            "CRYPTO_zalloc",
            "ztrymalloc_usable_internal",
        ] {
            assert!(wrappers.contains(wrapper), "{wrapper}");
        }
        for other in [
            "main",
            "make_node(std::allocator<int>&)",
            "mystd::make",
            "my::alloc::Pool::get",
            "ngx_palloc",
            "AllocSetAlloc",
            "<app::Node as core::clone::Clone>::clone",
            "xmlParse",
            "operator_new",
            "std::sys::backtrace::__rust_begin_short_backtrace",
            "std::_Function_handler<void (), main::{lambda()#1}>::_M_invoke(std::_Any_data const&)",
            "std::thread::_State_impl<std::thread::_Invoker<std::tuple<main::{lambda()#1}> > >::_M_run()",
            "",
        ] {
            assert!(!wrappers.contains(other), "{other}");
        }
    }

    #[test]
    fn users_add_theirs() {
        let wrappers = Wrappers::new(vec!["my_pool_*".to_owned(), "Arena<*>::get".to_owned()]);
        assert!(wrappers.contains("my_pool_get"));
        assert!(wrappers.contains("Arena<Node>::get(unsigned long)"));
        assert!(wrappers.contains("malloc"));
        assert!(!wrappers.contains("get"));
    }
}
