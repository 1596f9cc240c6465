%% A row of a store's index, see erllama_cache_index.
-record(row, {
    key :: erllama_cache_nif:key() | '_' | '$2',
    %% Of the file in bytes; of a reservation, what its file may take.
    size = 0 :: non_neg_integer() | '_',
    %% Milliseconds of system time.
    last_used = 0 :: integer() | '_' | '$1',
    state :: erllama_cache_index:state() | '_',
    token :: reference() | '_',
    %% Of a reservation: whose it is, and when its lease ends, in milliseconds of monotonic time.
    pid :: pid() | undefined | '_',
    expires :: integer() | undefined | '_',
    %% Of a file: uses that are not noted in it yet, and when the last note was made, in seconds.
    uses = 0 :: non_neg_integer() | '_',
    noted = 0 :: integer() | '_'
}).
