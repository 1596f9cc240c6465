%% What errors are in words.
-module(erllama_cache_error_tests).

-include_lib("eunit/include/eunit.hrl").

-define(WRITER, erllama_cache_writer).

%% No documented reason is told as the system's unknown error.
format_error_test_() ->
    Reasons = [
        max_concurrent, weight_exceeds_limit, cancelled, already_present, conflict, expired,
        prefix_too_long, {missing_key, tokens}, {invalid_meta, tokens},
        {read_back, content_mismatch}, {corrupt, crc_mismatch}, {corrupt, not_regular},
        unauthenticated, {wrong_tier, disk}, exceeds_max_bytes, no_room, {mac_key, bad_key},
        {mac_key, raised}, {mac_key, enoent}, {errno, 5000}, badarg, enospc, eio, enoent, emfile,
        {error, eio}, out_of_turn, {unknown_quant_byte, 255}, tier_busy
    ],
    [
        fun() ->
            Text = ?WRITER:format_error(Reason),
            ?assert(io_lib:printable_unicode_list(Text)),
            ?assertEqual(nomatch, string:find(Text, "unknown"))
        end
     || Reason <- Reasons
    ] ++
        [
            ?_assertEqual("no space left on device", ?WRITER:format_error(enospc)),
            ?_assertEqual("the file is corrupt: crc mismatch",
                          ?WRITER:format_error({error, {corrupt, crc_mismatch}})),
            ?_assertEqual("erllama is not there, or of an unknown kind: it lacks a:b/1, c:d/2",
                          ?WRITER:format_error({error, {unknown_host, [{a, b, 1}, {c, d, 2}]}})),
            ?_assertEqual("{what,[1]}", ?WRITER:format_error({what, [1]}))
        ].
