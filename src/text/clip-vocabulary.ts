/**
 * CLIP's tokenizer as `vocab.json` and `merges.txt`, the pair of files that the Stable Diffusion 3.5 repositories have
 * in place of a `tokenizer.json`. What the pair leaves unsaid (how text is normalised and divided) is the same for
 * every CLIP and stands here, as in the `tokenizer.json` published with CLIP (openai/clip-vit-large-patch14).
 */
import { MmditxError } from '../errors.ts';
import { isCount, parseJson, recordOf } from '../weights/json.ts';
import { quote } from '../weights/quote.ts';

export const CLIP_START = '<|startoftext|>';
export const CLIP_END = '<|endoftext|>';
export const CLIP_END_OF_WORD = '</w>';

/** What words are: special tokens, contractions, letters, single digits, other symbols. */
export const CLIP_WORDS = `<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+`;

const vocabularySchema = recordOf(isCount);

/**
 * The text of the `tokenizer.json` that `vocab.json` and `merges.txt` stand for.
 * @param vocabulary the text of `vocab.json`: an object from tokens to ids, which count from 0 without gaps
 * @param merges the text of `merges.txt`: a line for each pair of tokens that are joined, the most frequent first,
 *   after a line that starts with `#version`
 * @throws MmditxError `bad-file` when they are no such files or do not fit each other
 */
export function clipTokenizerJson(vocabulary: string, merges: string): string {
  const vocab = parseVocabulary(vocabulary);
  const [start, end] = [vocab.get(CLIP_START), vocab.get(CLIP_END)];
  if (start === undefined || end === undefined) {
    throw unusable('vocab.json', `it lacks ${start === undefined ? CLIP_START : CLIP_END}`);
  }
  return JSON.stringify({
    version: '1.0',
    truncation: null,
    padding: null,
    ...clipLayout({ start, end }),
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: CLIP_END,
      continuing_subword_prefix: '',
      end_of_word_suffix: CLIP_END_OF_WORD,
      fuse_unk: false,
      byte_fallback: false,
      vocab: Object.fromEntries(vocab),
      merges: parseMerges(merges, vocab),
    },
  });
}

/** A CLIP `tokenizer.json` without its vocabulary: how text becomes words, and the ids around a text. */
export function clipLayout({ start, end }: { readonly start: number; readonly end: number }) {
  const special = { single_word: false, lstrip: false, rstrip: false, special: true };
  return {
    added_tokens: [
      // The start token is matched after normalisation and the end token before it, as in the published file.
      { id: start, content: CLIP_START, ...special, normalized: true },
      { id: end, content: CLIP_END, ...special, normalized: false },
    ],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFC' },
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Lowercase' },
      ],
    },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        {
          type: 'Split',
          pattern: { Regex: CLIP_WORDS },
          behavior: 'Removed',
          invert: true,
        },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: {
      type: 'RobertaProcessing',
      sep: [CLIP_END, end],
      cls: [CLIP_START, start],
      trim_offsets: false,
      add_prefix_space: false,
    },
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
  };
}

function parseVocabulary(text: string): Map<string, number> {
  const json = parseJson(text, (fault) => unusable('vocab.json', `it ${fault}`));
  const parsed = vocabularySchema.safeParse(json);
  if (!parsed.success) throw unusable('vocab.json', 'it must give each token an id');
  const vocab = new Map(Object.entries(parsed.data));
  const ids = new Set(vocab.values());
  for (const [token, id] of vocab) {
    if (id >= vocab.size)
      throw unusable('vocab.json', `${quote(token)} has id ${id}, but there are ${vocab.size} tokens`);
  }
  if (ids.size < vocab.size) throw unusable('vocab.json', 'two of its tokens have the same id');
  return vocab;
}

function parseMerges(text: string, vocab: ReadonlyMap<string, number>): string[] {
  const lines = text
    .split(/\r?\n/)
    .filter((line, index) => line !== '' && !(index === 0 && line.startsWith('#version')));
  for (const line of lines) {
    const [left, right, ...more] = line.split(' ');
    if (!left || !right || more.length > 0) throw unusable('merges.txt', `${quote(line)} is not a pair of tokens`);
    const unknown = [left, right, left + right].find((token) => !vocab.has(token));
    if (unknown !== undefined) throw unusable('merges.txt', `vocab.json has no ${quote(unknown)}, which it uses`);
  }
  return lines;
}

function unusable(file: string, reason: string): MmditxError {
  return new MmditxError('bad-file', `CLIP's ${file} cannot be used: ${reason}; download it again.`);
}
