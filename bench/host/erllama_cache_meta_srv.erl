%% The host's server of reservations in a benchmark: the index of plain_writer, so that each way to
%% save has the same one. Like the host's, and unlike the tests' fake, it reads no file to see
%% whether that is what it is said to be.
-module(erllama_cache_meta_srv).

-export([reserve_save/3, check_reservation/2, mark_published/3, cancel_reservation/2]).
-ifdef(TEXT_KEYED).
-export([announce_saved/6]).
-else.
-export([announce_saved/5]).
-endif.

reserve_save(Key, _Tier, Pid) ->
    ask({reserve, Key, Pid}).

check_reservation(Key, Token) ->
    ask({check, Key, Token}).

mark_published(Key, Token, Path) ->
    ask({mark, Key, Token, Path}).

-ifdef(TEXT_KEYED).
announce_saved(Key, Token, Size, _Header, Tokens, _TextBytes) ->
    ask({announce, Key, Token, Size, Tokens}).
-else.
announce_saved(Key, Token, Size, _Header, Tokens) ->
    ask({announce, Key, Token, Size, Tokens}).
-endif.

cancel_reservation(Key, Token) ->
    ask({cancel, Key, Token}).

ask(Request) ->
    gen_server:call(plain_writer, Request).
