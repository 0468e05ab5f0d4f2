const MAX_LENGTH = 120;

/** Text or numbers of a file as they may stand in a message: cut to a line, control characters made harmless. */
export function quote(value: string | readonly (string | number)[]): string {
  const text = JSON.stringify(typeof value === 'string' ? value.slice(0, MAX_LENGTH) : value.slice(0, MAX_LENGTH));
  const cut = text.length > MAX_LENGTH ? `${text.slice(0, MAX_LENGTH)}…` : text;
  return cut.replace(/[\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, '?');
}
