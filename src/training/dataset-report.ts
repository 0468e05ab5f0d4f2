/** What a data set gives to train on, and what in it deserves a look, before hours are spent on it. */
import { quote } from '../weights/quote.ts';
import type { BucketFit } from './buckets.ts';
import type { PictureSize } from './config.ts';
import type { BrokenPicture, DatasetPicture } from './dataset.node.ts';

/** Pictures named of each kind. */
const NAMED = 5;

/** Most sizes in the table; pictures that are not enlarged can have hundreds. */
const MAX_SIZES = 40;

export interface TokenCounter {
  /** Of the encoder, e.g. `CLIP`. */
  readonly name: string;
  /** Tokens that the encoder takes, with those it adds itself. */
  readonly limit: number;
  /** Tokens of a text, counted likewise. */
  count(text: string): number;
}

type ReportedPicture = Pick<DatasetPicture, 'name' | 'width' | 'height' | 'captions'>;

export interface DatasetReportOptions {
  /** Everything a picture is made into: one for each size it is shown in. */
  readonly fits: (picture: ReportedPicture) => readonly BucketFit[];
  readonly counters?: readonly TokenCounter[];
  /** The texts a picture can be shown with; default its captions as they are written. */
  readonly texts?: (picture: ReportedPicture) => readonly string[];
  /** Pictures that lose a larger share of their area are named; 0 to 1, default 0.2. */
  readonly maxCropped?: number;
}

/** How many pictures something is true of, and the names of the first or worst five. */
export interface Finding<Detail> {
  readonly count: number;
  readonly worst: readonly ({ readonly name: string } & Detail)[];
}

export interface DatasetReport {
  readonly pictures: number;
  /** Texts that are not empty. */
  readonly captions: number;
  /** Ordered by width, then height. A picture counts in each size it is shown in. */
  readonly sizes: readonly SizeReport[];
  readonly tokens: readonly TokenReport[];
  readonly withoutCaption: Finding<object>;
  /** Each at its largest enlargement. */
  readonly enlarged: Finding<{ readonly scale: number; readonly bucket: PictureSize }>;
  readonly maxCropped: number;
  /** Those that lose more than `maxCropped`, each at its largest loss. */
  readonly cropped: Finding<{ readonly cropped: number; readonly bucket: PictureSize }>;
  readonly broken: Finding<{ readonly reason: string }>;
}

export interface SizeReport {
  readonly size: PictureSize;
  readonly pictures: number;
  /** Mean share of the area that is cropped. */
  readonly cropped: number;
  readonly enlarged: number;
}

/** Lengths of the captions in tokens of one encoder. */
export interface TokenReport {
  readonly encoder: string;
  readonly limit: number;
  readonly shortest: number;
  readonly median: number;
  readonly longest: number;
  /** Captions that are cut. `over` tokens of the text are not seen. */
  readonly cut: Finding<{ readonly tokens: number; readonly over: number }>;
}

export function datasetReport(
  { pictures, broken }: { readonly pictures: readonly ReportedPicture[]; readonly broken: readonly BrokenPicture[] },
  { fits, counters = [], texts = ({ captions }) => captions, maxCropped = 0.2 }: DatasetReportOptions,
): DatasetReport {
  const sizes = new Map<string, BucketFit[]>();
  const enlarged: { name: string; scale: number; bucket: PictureSize }[] = [];
  const cropped: { name: string; cropped: number; bucket: PictureSize }[] = [];
  const captions: { name: string; text: string }[] = [];
  const withoutCaption: { name: string }[] = [];
  for (const picture of pictures) {
    const { name } = picture;
    const made = fits(picture);
    for (const fit of made) {
      const key = fit.bucket.join();
      const others = sizes.get(key);
      if (others) others.push(fit);
      else sizes.set(key, [fit]);
    }
    const [largest] = largestFirst(made, ({ scale }) => scale);
    if (largest && isEnlarged(largest)) enlarged.push({ name, scale: largest.scale, bucket: largest.bucket });
    const [worst] = largestFirst(made, (fit) => fit.cropped);
    if (worst && worst.cropped > maxCropped) cropped.push({ name, cropped: worst.cropped, bucket: worst.bucket });
    const written = texts(picture).filter((text) => text !== '');
    if (written.length === 0) withoutCaption.push({ name });
    for (const text of written) captions.push({ name, text });
  }
  return {
    pictures: pictures.length,
    captions: captions.length,
    sizes: [...sizes.values()].map(sizeReport).sort((a, b) => a.size[0] - b.size[0] || a.size[1] - b.size[1]),
    tokens: captions.length > 0 ? counters.map((counter) => tokenReport(counter, captions)) : [],
    withoutCaption: finding(withoutCaption, () => 0),
    enlarged: finding(enlarged, ({ scale }) => scale),
    maxCropped,
    cropped: finding(cropped, (picture) => picture.cropped),
    broken: finding(broken, () => 0),
  };
}

/** Rounding to whole pixels is not enlarging. */
function isEnlarged({ scale }: BucketFit): boolean {
  return scale > 1.01;
}

function sizeReport(fits: readonly BucketFit[]): SizeReport {
  return {
    size: fits[0]!.bucket,
    pictures: fits.length,
    cropped: fits.reduce((sum, fit) => sum + fit.cropped, 0) / fits.length,
    enlarged: fits.filter(isEnlarged).length,
  };
}

function tokenReport(
  { name: encoder, limit, count }: TokenCounter,
  captions: readonly { readonly name: string; readonly text: string }[],
): TokenReport {
  const counted = captions.map(({ name, text }) => ({ name, tokens: count(text) }));
  const lengths = counted.map(({ tokens }) => tokens).sort((a, b) => a - b);
  const cut = counted.map((caption) => ({ ...caption, over: caption.tokens - limit })).filter(({ over }) => over > 0);
  return {
    encoder,
    limit,
    shortest: lengths[0]!,
    median: lengths[Math.floor((lengths.length - 1) / 2)]!,
    longest: lengths.at(-1)!,
    cut: finding(cut, ({ over }) => over),
  };
}

function finding<Item>(items: readonly Item[], badness: (item: Item) => number): { count: number; worst: Item[] } {
  return { count: items.length, worst: largestFirst(items, badness).slice(0, NAMED) };
}

/** Equal ones keep their order. */
function largestFirst<Item>(items: readonly Item[], value: (item: Item) => number): Item[] {
  return [...items].sort((a, b) => value(b) - value(a));
}

/** The report as lines for a terminal. */
export function reportText(report: DatasetReport): string {
  const { pictures, captions, tokens, withoutCaption, enlarged, cropped, broken } = report;
  const sections = [
    [`${counted(pictures, 'picture')}, ${counted(captions, 'caption')}`],
    sizeTable(report.sizes),
    tokens.length > 0 ? tokenTable(tokens) : [],
    ...tokens.map(({ encoder, limit, cut }) =>
      list(`Cut for ${encoder}, which takes ${counted(limit, 'token')}`, cut, ({ name, tokens: all, over }) => [
        counted(all, 'token'),
        `${over} not seen`,
        quote(name),
      ]),
    ),
    list('Without caption', withoutCaption, ({ name }) => [quote(name)]),
    list('Enlarged', enlarged, ({ name, scale, bucket }) => [
      `${scale.toFixed(1)} times`,
      sizeText(bucket),
      quote(name),
    ]),
    list(`Cropped by more than ${percent(report.maxCropped, 0)}`, cropped, ({ name, cropped: share, bucket }) => [
      percent(share),
      sizeText(bucket),
      quote(name),
    ]),
    list('Cannot be used', broken, ({ name, reason }) => [`${quote(name)} ${reason}`]),
  ];
  return sections
    .filter((lines) => lines.length > 0)
    .map((lines) => lines.join('\n'))
    .join('\n\n');
}

function sizeTable(sizes: readonly SizeReport[]): string[] {
  if (sizes.length === 0) return [];
  const total = sizes.reduce((sum, { pictures }) => sum + pictures, 0);
  const shown = new Set(largestFirst(sizes, ({ pictures }) => pictures).slice(0, MAX_SIZES));
  const rows = sizes
    .filter((size) => shown.has(size))
    .map(({ size, pictures, cropped, enlarged }) => [
      sizeText(size),
      String(pictures),
      percent(pictures / total),
      percent(cropped),
      String(enlarged),
    ]);
  const others = sizes.length - shown.size;
  return [
    ...columns([['Size', 'Pictures', 'Share', 'Cropped', 'Enlarged'], ...rows]),
    ...(others > 0 ? [`and ${others} more sizes with fewer pictures`] : []),
  ];
}

function tokenTable(tokens: readonly TokenReport[]): string[] {
  const rows = tokens.map(({ encoder, shortest, median, longest, limit, cut }) => [
    encoder,
    ...[shortest, median, longest, limit, cut.count].map(String),
  ]);
  return columns([['Tokens', 'Shortest', 'Median', 'Longest', 'Limit', 'Cut'], ...rows]);
}

/** A heading with the count, and a line for each of those named. */
function list<Item>(
  heading: string,
  { count, worst }: { readonly count: number; readonly worst: readonly Item[] },
  row: (item: Item) => string[],
): string[] {
  if (count === 0) return [];
  const rows = worst.map(row);
  const figures = columns(
    rows.map((cells) => cells.slice(0, -1)),
    0,
  );
  // Names last: nobody knows how wide a terminal shows them.
  const lines = rows.map((cells, i) => `  ${[figures[i]!, cells.at(-1)!].filter((cell) => cell !== '').join('  ')}`);
  return [`${heading}: ${count}`, ...lines, ...(count > worst.length ? [`  and ${count - worst.length} more`] : [])];
}

/** Cells in columns: the first `left` of them aligned left, the others right. */
function columns(rows: readonly (readonly string[])[], left = 1): string[] {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((cells) => cells[column]!.length)));
  const padded = (cell: string, column: number) =>
    column < left ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!);
  return rows.map((cells) => cells.map(padded).join('  ').trimEnd());
}

function counted(count: number, thing: string): string {
  return `${count} ${thing}${count === 1 ? '' : 's'}`;
}

function percent(share: number, digits = 1): string {
  return `${(100 * share).toFixed(digits)} %`;
}

function sizeText([width, height]: PictureSize): string {
  return `${width} x ${height}`;
}
