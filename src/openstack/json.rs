//! Reading JSON answers into structs: a field that is missing or of another type becomes an error that names it.

use std::collections::BTreeMap;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde_json::Value;

use super::error::{Error, Result, shorten};

/// Reads the answer to `call`.
pub(super) fn read<'de, T, D>(call: &str, json: D) -> Result<T>
where
    T: Deserialize<'de>,
    D: Deserializer<'de, Error = serde_json::Error>,
{
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        let detail = match (error.is_data(), path.as_str()) {
            (false, _) => format!("the body is no JSON: {error}"),
            (true, ".") => format!("the answer: {error}"),
            (true, path) => format!("field {path:?}: {error}"),
        };
        Error::protocol(call, shorten(&detail))
    })
}

/// The default for null too, not only for a field that is missing.
pub(super) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    json: D,
) -> std::result::Result<T, D::Error> {
    Option::deserialize(json).map(Option::unwrap_or_default)
}

/// `false` for null; services write `true` and `"true"`.
pub(super) fn flag<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<bool, D::Error> {
    match Value::deserialize(json)? {
        Value::Null => Ok(false),
        Value::Bool(flag) => Ok(flag),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(false),
        _ => Err(D::Error::custom("expected true or false")),
    }
}

/// The strings of an object; values of other types are left out.
pub(super) fn texts<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<BTreeMap<String, String>, D::Error> {
    let values: BTreeMap<String, Value> = or_default(json)?;
    let text = |(name, value)| match value {
        Value::String(text) => Some((name, text)),
        _ => None,
    };
    Ok(values.into_iter().filter_map(text).collect())
}

#[cfg(test)]
pub(super) mod hostile {
    //! JSON that no service would send.

    use proptest::prelude::*;
    use serde_json::Value;

    /// Any JSON; its objects use `names`, so that fields of the wrong type are met.
    pub(crate) fn value(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,20}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 40, 10, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::hash_map(
                    prop_oneof![3 => proptest::sample::select(names).prop_map(str::to_owned), 1 => ".{0,8}"],
                    inner,
                    0..10
                )
                .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }
}
