"""Validates what `--json` prints, with the jsonschema of the lab's Python."""

from jsonschema import Draft202012Validator
from referencing import Registry, Resource


def run(request):
    """Writes a list for each of the documents: what the schema objects to."""
    schemas = request['schemas']
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    registry = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in schemas.items())
    validator = Draft202012Validator(schemas[request['schema']], registry=registry)
    objections = [
        [f'{error.json_path}: {error.message}' for error in validator.iter_errors(document)]
        for document in request['documents']
    ]
    print(json.dumps(objections))
