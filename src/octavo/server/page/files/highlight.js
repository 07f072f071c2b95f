/** Color code, roughly and for most languages alike: comments, strings, numbers and keywords. */

const KEYWORDS = new Set(
  `and as async await begin break case catch class const continue def default del do done echo elif
else end enum esac except export extends extern false fi final finally fn for foreach from func function global if impl
implements import in include interface is lambda let local loop match mod module mut namespace new nil none not null of
or package pass private protected pub public raise return self static struct super switch template then this
throw trait true try type typedef typeof union unless until use using var virtual void where while with yield int float
double char bool string None True False
SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT INNER ON GROUP BY ORDER LIMIT HAVING AS
AND OR NOT NULL`.split(/\s+/),
);
const HASH =
  /^(py|python|sh|bash|zsh|shell|console|ruby|rb|perl|r|yaml|yml|toml|ini|conf|dockerfile|make|elixir|julia)$/i;
const DASH = /^(sql|lua|haskell|hs|ada|elm)$/i;
const NONE = /^(|text|txt|plain|plaintext|markdown|md|output|log)$/i;
const STRINGS = [
  String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)`,
  String.raw`"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?`,
  "`(?:\\\\.|[^`\\\\])*`?",
].join("|");
const REST = String.raw`(?<number>\b(?:0[xob])?\d[\w.]*)|(?<word>[A-Za-z_$][\w$]*)`;
const MAX_LENGTH = 50_000; // characters; longer code is left as it is

/**
 * Split code into parts.
 * @returns {{kind: string, text: string, at: number}[]} `kind` is "", "comment", "string", "number" or "keyword".
 */
export function highlighted(text, language) {
  if (NONE.test(language) || text.length > MAX_LENGTH) return [{ kind: "", text, at: 0 }];
  const comment = HASH.test(language)
    ? "#.*"
    : DASH.test(language)
      ? "--.*"
      : String.raw`\/\/.*|\/\*[\s\S]*?(?:\*\/|$)|<!--[\s\S]*?-->`;
  const scan = new RegExp(`(?<comment>${comment})|(?<string>${STRINGS})|${REST}`, "g");
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(scan)) {
    const { comment: isComment, string, number, word } = match.groups;
    const kind = isComment ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) ? "keyword" : "";
    if (!kind) continue;
    if (match.index > from) parts.push({ kind: "", text: text.slice(from, match.index), at: from });
    parts.push({ kind, text: match[0], at: match.index });
    from = match.index + match[0].length;
  }
  if (from < text.length) parts.push({ kind: "", text: text.slice(from), at: from });
  return parts;
}
